"""Trains a network: `python train.py --config=configs/NAME.py --workdir=DIR`; see --help."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # absent with PYTHONSAFEPATH

from launch.interrupt import StopSignal, end_on_interrupt
from rezero_jax import command

if __name__ == "__main__":
    end_on_interrupt("train.py")  # before any slow import
    command.open_streams(lasting=True)

import contextlib
import json
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launch import flags

STARTED = time.perf_counter()


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    args, overrides = flags.parse(argv)
    # Imported here so that --help and a wrong flag get an immediate answer.
    from jax.errors import JaxRuntimeError

    from launch.connect import connect
    from rezero_jax import devices, processes
    from rezero_jax.config import load_config
    from rezero_jax.errors import UserError
    from rezero_jax.runs.files import write_json
    from rezero_jax.training import load
    from rezero_jax.training.loop import Diverged, Interrupted, evaluate, train

    # A config file may import modules beside it, and name those and the user's by "module:name".
    with contextlib.suppress(FileNotFoundError):  # the current folder was deleted
        sys.path.append(os.getcwd())
        if args.config:
            sys.path.append(os.path.dirname(os.path.abspath(args.config.partition(":")[0])))
    status, dataset = 0, None
    lines: Iterable[str]
    try:
        if args.config:
            config = load_config(args.config, overrides)
        else:
            config = load.checked_config(args.workdir, args.allow, overrides)
        if config.mesh.cpu_devices is not None:
            devices.set_cpu_devices(config.mesh.cpu_devices)
        if args.plan not in (None, "here"):
            devices.use_cpu()
        devices.cache_compilations()
        if args.plan is None:  # a plan is made by this process alone
            connect(args.coordinator, args.process_id, args.num_processes)
        devices.check_platform()
        try:
            if args.plan is not None:
                from rehearsal.plan import plan, render

                account = plan(config, None if args.plan == "here" else args.plan)
                lines = [render(account)]
                if args.plan_json:
                    write_json(Path(args.plan_json), account)
            elif args.mode == "eval":
                if not args.config:
                    dataset = load.load_dataset(args.workdir, config, "config.data.path")
                lines = [json.dumps(evaluate(config, args.workdir, dataset, args.step))]
            else:
                options = {"profile": args.profile_steps, "began": STARTED}
                with StopSignal("train.py") as stop:
                    final = train(config, args.workdir, **options, stop=stop)
                lines = _summary(final, args.workdir)
            if processes.is_first():
                for line in lines:
                    print(line)
        except (Diverged, Interrupted) as error:
            print(f"train.py: {error}", file=sys.stderr)
            status = 3 if isinstance(error, Diverged) else 128 + error.signum
        except UserError:
            raise
        except (JaxRuntimeError, ValueError) as error:
            processes.raise_cause(error)
        processes.shutdown()
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.status
    return status


def _summary(final: dict[str, Any], workdir: str) -> Iterator[str]:
    from rezero_jax.errors import first_line
    from rezero_jax.processes import warn
    from rezero_jax.training.progress import TIMES

    numbers = ", ".join(f"{k} {final[k]:.4f}" for k in sorted(final) if k.startswith("eval/"))
    yield f"finished {final['steps']:,} steps: {numbers}"
    seconds, times = final["seconds"], {kind: final.get(f"time/{kind}") for kind in TIMES}
    shares = [f"{kind} {spent / seconds:.1%}" for kind, spent in times.items() if spent]
    yield f"time:            {seconds:,.1f} s in all starts: {', '.join(shares)}"
    yield f"run folder:      {workdir}"
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own, which a command inherits, may be absent
    try:
        from rezero_jax.analysis.plots import write_plot  # Matplotlib is slow to import

        yield f"learning curves: {write_plot([workdir])}"
    except Exception as error:
        warn(f"the learning curves cannot be drawn ({first_line(error)}); the run is complete")


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # After a failed write, Orbax's threads never end, and a normal exit would wait for them.
        os._exit(status)
