"""`python -m let_plugin.demo [CONFIG.toml ...]`: trains configurations, and the first without LET, and compares them.

Same seed, same order of the data; each run is a process of its own, so that none warms another up. What the runs
logged is kept; the comparison is printed, plotted, and written to `result.json` with its provenance.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import tomli

from let_plugin.bench import report, rows
from let_plugin.demo import compare


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m let_plugin.demo", description=__doc__.split("\n\n")[0])
    configs = ["train_configs/demo.toml", "train_configs/demo_recipe.toml"]
    parser.add_argument("configs", nargs="*", default=configs, help="TOML files with a [let] table")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="parent of the new result folder")
    parser.add_argument("--record", type=Path, help="a .jsonl file to append the result to, as a row")
    args, options = parser.parse_known_args()

    origin = rows.provenance()
    out: Path = args.out / time.strftime("%Y%m%d-%H%M%S")
    started = time.monotonic()
    let_train = [sys.executable, "-m", "let_plugin.train"]
    runs = {"plain": [args.configs[0], "--let.no-enable", *options]}
    runs |= {Path(config).stem: [config, "--let.enable", *options] for config in args.configs}
    for name, argv in runs.items():
        command = [*let_train, *argv, "--dump_folder", str(out / name)]
        print(f"\n=== {name}: let-train {' '.join(command[3:])}", flush=True)
        if code := subprocess.run(command).returncode:
            raise SystemExit(code)

    result = compare.compare({name: out / name for name in runs})
    show = [*let_train, *list(runs.values())[-1], "--print-config"]
    config = subprocess.run(show, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = rows.row(
        "demo",
        origin,
        command=rows.command_line("python -m let_plugin.demo", sys.argv[1:]),
        config=config,
        seed=tomli.loads(config).get("debug", {}).get("seed"),
        unit="nats/token",
        values=[run["held_out_loss"] for run in result["runs"].values()],
        seconds=round(time.monotonic() - started, 1),
        **result,
    )
    (out / "result.json").write_text(json.dumps(row) + "\n")
    if args.record is not None:
        rows.append(args.record, row)
    report.plot([out / name for name in runs], out / "comparison.png")

    print(f"\n{compare.table(result)}\n")
    print(f"plot         {out / 'comparison.png'}")
    print(f"TensorBoard  tensorboard --logdir {out}")
    print(f"numbers      {out / 'result.json'}, {out}/*/metrics.jsonl")


if __name__ == "__main__":
    main()
