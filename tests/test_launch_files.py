"""The files for `accelerate launch` say what Accelerate reads, and what the Trainer takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).parent.parent / "recipes" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_every_key(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # an unknown key is a ValueError
    assert config.distributed_type.value == KINDS[name]
    # The nested ones are not checked there: each must be an option of `accelerate launch`.
    options = {action.dest for action in launch_command_parser()._actions}
    content = yaml.safe_load(path.read_text())
    nested = {key: values for key, values in content.items() if isinstance(values, dict)}
    assert set(nested) == {"ddp": set(), "fsdp2": {"fsdp_config"}, "deepspeed_zero2": {"deepspeed_config"}}[name]
    for values in nested.values():
        assert set(values) <= options


def test_an_unknown_key_would_be_noticed(tmp_path):
    path = tmp_path / "ddp.yaml"
    path.write_text((FOLDER / "ddp.yaml").read_text() + "num_process: 3\n")
    with pytest.raises(ValueError, match="num_process"):
        load_config_from_file(str(path))


def test_fsdp_is_what_the_trainer_takes():
    config = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    assert config["fsdp_version"] == 2 and config["fsdp_cpu_ram_efficient_loading"] is False


def test_the_file_that_was_not_run_says_so():
    assert "NOT RUN" in (FOLDER / "deepspeed_zero2.yaml").read_text()
