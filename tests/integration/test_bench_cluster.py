"""`dspark bench` on a cluster of its own."""

import asyncio
import json
import os
import sys
from pathlib import Path

FIGURES = ("tokens_per_second", "speed_p50", "speed_p90", "first_token_p50", "first_token_p99", "tau", "wasted")


async def test_two_policies_at_two_concurrencies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, path, pictures = tmp_path / "prompts.jsonl", tmp_path / "report.json", tmp_path / "pictures"
    prompts.write_text("".join(json.dumps({"turns": [f"Tell me of {n} and {n * n}"]}) + "\n" for n in range(40)))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from dspark.cli import main; main()", "bench", "--prompts", str(prompts)),
        *("--model", str(pair[0]), "--drafter", str(pair[1]), "--dtype", "float32", "--json", str(path)),
        *("--policy", "none,fixed:7", "--concurrency", "1,3", "--requests", "4", "--repeats", "2"),
        *("--max-tokens", "24", "--ignore-eos", "--plots", str(pictures)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()

    facts = json.loads(path.read_text())
    assert facts["complete"] is True
    assert facts["served"]["prefix_cache"] is False
    assert facts["served"]["verify_length"] >= 7
    assert facts["served"]["workers"] == {"draft": 1, "verify": 1}
    assert facts["machine"]["cores"] >= 1
    order = [(cell["repeat"], cell["concurrency"], cell["policy"]) for cell in facts["cells"]]
    first, second = ["none", "fixed:7"], ["fixed:7", "none"]
    assert order == [(r, c, p) for r, turn in enumerate((first, second)) for c in (1, 3) for p in turn]
    for cell in facts["cells"]:
        assert (cell["errors"], cell["cached_tokens"]) == (0, 0)
        whole, cut = (4, 0) if cell["concurrency"] == 1 else (7, 8 + 16)  # first answers, of all users but the last
        assert cell["tokens"] == 24 * whole + cut
        assert all(cell[name] is not None for name in FIGURES)
        if cell["policy"] == "none":
            assert cell["tau"] == 1.0
            assert cell["drafted"] == cell["verified"] == cell["missed_rounds"] == 0
        else:
            assert cell["verified"] > cell["accepted"] > 0
            assert cell["tau"] > 1.0
    # Prompts and seeds were the same, so the tokens are, with much, little or no speculation.
    assert facts["same_outputs"] == {"compared": 26, "equal": 26}
    summary = {(row["concurrency"], row["policy"]): row for row in facts["summary"]}
    assert set(summary) == {(c, p) for c in (1, 3) for p in first}
    assert len(summary[3, "fixed:7"]["ratios"]["tokens_per_second"]["values"]) == 2
    assert facts["matched"]["baseline"] == "none"

    assert sorted(picture.name for picture in pictures.iterdir()) == [
        "speed.svg",
        "throughput.svg",
        "verify-length.svg",
    ]
    assert "Same tokens as with none: 26 of 26 answers." in out.decode()
