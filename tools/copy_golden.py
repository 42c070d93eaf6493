"""Copy what the tests need of the reference data into tests/golden: ``python tools/copy_golden.py SRC_DIR``.

The sources hold inputs, weights, outputs and gradients of the official implementations, in two layouts
(``case/group.name`` and ``case.group.name``). The copies have one: keys ``case/group.name``, and in the metadata
``golden``, JSON of ``sources`` (repository, commit, files), ``cases`` (hyper-parameters of each) and ``notes``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden"
MAX_BYTES = 11_000_000

#: File -> pattern of the tensors to leave out, None to copy all.
FILES = {
    "response_kd": r"/out\.ce_form$",
    "response_deit": None,
    "response_dkd": None,
    "response_normkd": None,
    "response_logitstd": None,
    "response_nkd": None,
    "response_uskd": None,
    "response_atkd_spherical": None,
    "response_mlld": None,
    "response_mlld_logitstd": None,
    "response_ntce": None,
    # The larger of the cases at 100 classes: one of them is enough.
    "response_cskd": r"^c100_large_f32_hard",
    "response_sdd": r"^c100_large_f32_N21",
    "response_tfkd": None,
    "response_ofakd": None,
    "response_mekd": None,
    "response_wttm": None,
    "response_tinyvit": None,
    "response_dist": None,
    "feature_vitkd": r"/rng\.(mask|ids_restore)$",
    "feature_fitnet": None,
    "feature_afd": None,
    "feature_at": None,
    "feature_attention_probe": None,
    "feature_attndistill": None,
    "feature_camkd": None,
    "feature_cc": None,
    "feature_cfd": None,
    "feature_crd": None,
    "feature_crosskd": None,
    "feature_cwd": None,
    "feature_dinov3_distill": None,
    "feature_ft": None,
    "feature_lightly_distill": None,
    "feature_manifold": None,
    "feature_mgd": None,
    "feature_minilm": None,
    "feature_mmkd": None,
    "feature_nst": None,
    "feature_ofd": None,
    "feature_pkt": None,
    "feature_promptkd": None,
    "feature_reviewkd": None,
    "feature_rkd": None,
    "feature_simkd": None,
    "feature_sp": None,
    "feature_srrl": None,
    "feature_takt": None,
    "feature_tat": None,
    "feature_vid": None,
    # What the relations do not depend on: all behind the last blocks' qkv, and the relation cases' own inputs.
    "feature_tinymim": (
        r"relation_\w+/(w\..*|in\.x_.|grad\.x_s|out\..._.)$|/w\.(student|teacher)\.norm\."
        r"|/w\.(student\.blocks\.11|teacher\.blocks\.3)\.(attn\.proj|norm2|mlp)\."
    ),
}


def copy(source: Path, target: Path, leave_out: str | None) -> None:
    """Copy one file in the common layout."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        meta = json.loads(metadata.get("meta") or metadata["golden"])
        tensors = {unify(key, meta["cases"]): file.get_tensor(key) for key in file.keys()}
    kept = {key: x for key, x in tensors.items() if leave_out is None or not re.search(leave_out, key)}
    copied = {key.partition("/")[0] for key in kept}
    cases = {case: facts.get("hyperparameters", facts) for case, facts in meta["cases"].items() if case in copied}
    sources = meta.get("sources") or [{key: meta[key] for key in ("repo", "commit", "files")}]
    # One key: safetensors writes several in a random order, and a copy must not differ from the last one.
    save_file(kept, target, {"golden": json.dumps({"sources": sources, "cases": cases, "notes": meta["notes"]})})
    target.chmod(0o644)


def unify(key: str, cases: dict) -> str:
    """``case.group.name`` -> ``case/group.name``."""
    case = max((c for c in cases if key.startswith((f"{c}.", f"{c}/"))), key=len)
    return f"{case}/{key[len(case) + 1 :]}"


def main(source_dir: str) -> None:
    TARGET.mkdir(exist_ok=True)
    for name, leave_out in FILES.items():
        copy(Path(source_dir) / f"{name}.safetensors", TARGET / f"{name}.safetensors", leave_out)
    total = sum(path.stat().st_size for path in TARGET.iterdir())
    if total > MAX_BYTES:
        raise SystemExit(f"tests/golden must stay below {MAX_BYTES} bytes, got {total}; leave more out.")
    print(f"{len(FILES)} files, {total} bytes in tests/golden")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
