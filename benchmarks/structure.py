"""Which networks can be made narrower, and whether what is left works.

    python benchmarks/structure.py [--only KIND] [--minutes N]

Every kind of network of the zoo, at its smaller batch, with random weights, is asked for 30 % and for 50 % of its parameters. Reached means: at least four fifths
of what was asked for are gone, a forward and a backward pass give finite values, and the network that a fresh process builds from `architecture.json` and
the safetensors file answers the same, as does its ONNX form in ONNX Runtime (within 1e-3 of the largest output). What is kept whole is listed with the
reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

import results_file
import zoo

SHARES = (0.3, 0.5)
PART = 4 / 5
BOUND = 17 / 20
LIMIT_SECONDS = 900.0


def cases() -> dict[str, zoo.Case]:
    """The smaller batch of each kind."""
    found: dict[str, zoo.Case] = {}
    for case in zoo.load_cases():
        if case.kind not in found or case.batch_size < found[case.kind].batch_size:
            found[case.kind] = case
    return {kind: case for kind, case in found.items() if case.precision == "fp32"}


def measure(kind: str) -> dict[str, Any]:
    case = cases()[kind]
    return {"row": kind, "case": case.name, "asked": {f"{share:.0%}": ask(case.name, share) for share in SHARES}}


def ask(name: str, share: float) -> dict[str, Any]:
    """Cut in one process, and loaded and compared in another."""
    with tempfile.TemporaryDirectory() as folder:
        answer = child("cut", name, str(share), folder)
        if "removed" in answer and answer["removed"] > 0:
            answer |= child("load", name, str(share), folder)
        answer["reached"] = bool(
            answer.get("removed", 0.0) >= PART * share
            and answer.get("finite")
            and answer.get("loaded_difference", 1.0) <= 1e-5
            and answer.get("onnx_difference", 1.0) <= 1e-3
        )
        return answer


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(results_file.HERE / "structure_child.py"), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {LIMIT_SECONDS:g} s"}
    if answer.returncode:
        return {"error": (answer.stderr.strip().splitlines() or ["no words"])[-1][:300]}
    return json.loads(answer.stdout.splitlines()[-1])


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        results_file.bound_at_least(
            f"share of {len(rows)} kinds of network that reach {PART:.0%} of {share}",
            sum(row["asked"][share]["reached"] for row in rows) / len(rows),
            BOUND,
        )
        for share in (f"{share:.0%}" for share in SHARES)
    ]


def show(row: dict[str, Any]) -> None:
    for share, found in row["asked"].items():
        words = found.get("error") or (
            f"{found['removed']:.0%} gone, loaded {found.get('loaded_difference', float('nan')):.1e}, ONNX {found.get('onnx_difference', float('nan')):.1e}"
        )
        whole = "; ".join(f"{name}: {why}" for name, why in list(found.get("whole", {}).items())[:3])
        print(
            f"{row['row']:30} {share}: {'reached' if found['reached'] else 'NOT reached'}, {words[:150]}  kept whole: {whole[:230]}",
            flush=True,
        )


def main() -> None:
    kinds = list(cases())
    options = results_file.read_options(__doc__.splitlines()[0], kinds)
    results_file.fill_table("structure", kinds, options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
