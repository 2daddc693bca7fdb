"""The commands, one short function each: a config in, a result on stdout, all else on stderr, the exit code.

Heavy imports stand inside the functions, so `edgespec --help` needs no torch.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from edgespec import (
    commands_bench,
    commands_draft,
    commands_latency,
    commands_recommend,
    commands_speculation,
    commands_stream,
    commands_trim,
    commands_vision,
)
from edgespec.answering import give_sight, opened, settings
from edgespec.config import CheckConfig, ExportConfig, InspectConfig
from edgespec.config_answering import ChatConfig, GenerateConfig
from edgespec.config_device import BuildConfig, PushConfig, TuneConfig
from edgespec.config_evaluation import EvalConfig
from edgespec.console import Terminated, load, print_json, verified, written
from edgespec.errors import InputError
from edgespec.files import written_whole
from edgespec.flags import RANDOM
from edgespec.progress import Progress


def export(config: ExportConfig, as_json: bool, progress: Progress) -> int:
    """Make a bundle."""
    config.check()
    run = load("edgespec.exporters", "export")
    if config.soc:
        load("edgespec.exporters.qualcomm", "device", extra="qnn")()  # before the slow steps
    render = load("edgespec.runtime.text", "render") if config.coded else None
    bundle = run(config, progress, load("edgespec.runtime.engine", "Engine"), render)
    if as_json:
        print_json("export", {"bundle": str(bundle.path), "files": len(bundle.manifest.files)})
    else:
        print(bundle.path)
    if config.target.startswith(RANDOM):
        progress.note("its weights are random: it shows speed and size, and its text means nothing")
    progress.note(f"next: edgespec inspect {bundle.path}")
    return 0


def inspect(config: InspectConfig, as_json: bool, progress: Progress) -> int:
    """Print what a bundle holds and what it costs a device."""
    from edgespec.count import count
    from edgespec.report import to_json, to_table

    bundle = verified(config.bundle, progress)
    costs = count(bundle)
    if as_json:
        print_json("inspect", to_json(costs))
    else:
        print(to_table(costs), end="")
    progress.note(f"next: edgespec check {config.bundle}")
    return 0


def check(config: CheckConfig, as_json: bool, progress: Progress) -> int:
    """Prove a bundle; exit 1 if it does not do what its source does."""
    config.check()
    bundle = verified(config.bundle, progress)
    from edgespec.profiles import operators

    run = load("edgespec.exporters.check", "check")
    engine = load("edgespec.runtime.engine", "Engine")
    allowed = operators(config.ops or bundle.manifest.device)
    on_npu = ()
    if config.npu:
        check_npu = load("edgespec.exporters.check_qualcomm", "check_qualcomm", extra="qnn")
        on_npu = check_npu(bundle, engine, config.soc, config.text, progress)
    result = run(
        bundle, engine, allowed, config.source, config.text, config.self_only, progress, config.draft_source
    ).and_also(on_npu)
    if as_json:
        print_json("check", result.to_json())
    else:
        print("\n".join(result.lines()))
    verdict = f'edgespec generate {config.bundle} "..."' if result.passed else "export the bundle again"
    progress.note(f"next: {verdict}")
    return 0 if result.passed else 1


def generate(config: GenerateConfig, as_json: bool, progress: Progress) -> int:
    """Answer a prompt, speculatively; the text is that of plain decoding."""
    config.check()
    how = settings(config)
    with (
        written(config.trace) if config.trace else nullcontext() as trace,
        commands_latency.predicted_costs(config.bundle, config.profile) as costs,
        opened(config, progress, costs) as runtime,
    ):
        session = runtime.session()
        if config.image:
            give_sight(runtime)
        asked = {"raw": config.raw, "trace": trace, "images": config.image}
        for piece in session.stream(config.prompt, how, **asked):
            if not as_json:
                print(piece, end="", flush=True)
    if as_json:
        print_json("generate", session.answer.to_json())
    else:
        print()
    if config.stats:
        from edgespec.report import stats_lines

        print("\n".join(stats_lines(session.answer.stats)), file=sys.stderr)
    progress.note(f"next: edgespec chat {config.bundle}")
    return 0


def chat(config: ChatConfig, as_json: bool, progress: Progress) -> int:
    """Talk to a bundle in the terminal: /reset starts anew, /image FILE shows an image with the next words,
    /quit or the end of the input ends.
    """
    config.check()
    with opened(config, progress) as runtime:
        session, images = runtime.session(), list[str]()
        for line in _typed(sys.stdin.isatty()):
            if line == "/quit":
                break
            if line == "/reset":
                session.close()
                session, images = runtime.session(), []
                continue
            if line.partition(" ")[0] == "/image":
                if file := line.removeprefix("/image").strip():
                    images.append(file)
                else:
                    print(
                        InputError("no image is named", "/image FILE, then words about it"), file=sys.stderr
                    )
                continue
            shown, images = images, []
            try:
                if shown:
                    give_sight(runtime)
                for piece in session.stream(line, settings(config), images=shown):
                    print("" if as_json else piece, end="", flush=True)
            except Terminated:
                raise
            except KeyboardInterrupt:  # ends the answer, not the conversation
                print("" if as_json else " [interrupted]", end="")
            except InputError as error:
                print(error, file=sys.stderr)
                continue
            print(json.dumps(session.answer.to_json()) if as_json else "")
    return 0


def build(config: BuildConfig, as_json: bool, progress: Progress) -> int:
    """Compile the native runtime now; prints where the binary is."""
    path = load("edgespec.runtime.build", "binary")(progress.note, config.sanitize, config.arch)
    if as_json:
        print_json("build", {"binary": str(path)})
    else:
        print(path)
    return 0


def tune(config: TuneConfig, as_json: bool, progress: Progress) -> int:
    """Measure what a call costs at each width, for the rule that decides how much to draft."""
    config.check()
    runtime_type = load("edgespec.runtime.session", "Runtime", extra="onnx")
    cpu, table_of = (load("edgespec.runtime.machine", name, extra="onnx") for name in ("cpu", "table_of"))
    with runtime_type.open(config.bundle, config.threads, note=progress.note, tuned=False) as runtime:
        with progress.stage("call costs") as advance:
            table = runtime.tune(config.runs, advance)
        path = table_of(runtime.bundle.path)
    written_whole(path, json.dumps(table | {"cpu": cpu()}, indent=1) + "\n")
    if as_json:
        print_json("tune", {"file": str(path), "table": table})
    else:
        from edgespec.report import costs_lines

        print("\n".join(costs_lines(table)))
        print(path)
    progress.note(f'next: edgespec generate {config.bundle} "..." --stats')
    return 0


def eval(config: EvalConfig, as_json: bool, progress: Progress) -> int:
    """Measure what each eviction policy costs in quality, or how good the drafts are; ends with advice."""
    config.check()
    if config.speculation:
        return commands_speculation.speculation(config, as_json, progress)
    from pathlib import Path

    bundle = verified(config.bundle, progress)
    engine = load("edgespec.runtime.engine", "Engine")
    write_policy = load("edgespec.exporters.commit", "write_policy")
    render = load("edgespec.runtime.text", "render")
    from edgespec.evaluation import evaluate
    from edgespec.evaluation_plots import heat_maps
    from edgespec.evaluation_report import to_table, write

    result = evaluate(bundle, config, engine, write_policy, render, progress)
    folder = Path(config.output)
    try:
        pictures = heat_maps(result, folder)
    except ModuleNotFoundError as error:
        progress.note(f"no heat maps: {error.name} is not installed; pip install 'edgespec[plots]'")
        pictures = []
    write(result, folder, pictures)
    if as_json:
        print_json("eval", result.to_json())
    else:
        print(to_table(result), end="")
    progress.note(f"next: open {folder / 'report.html'}")
    return 0


def push(config: PushConfig, as_json: bool, progress: Progress) -> int:
    """Copy a bundle and the runtime to a device, check and tune it there, and say what to type next.

    Exit 1 if the device gives speculative text that is not its plain text.
    """
    config.check()
    run = load("edgespec.runtime.push", "push", extra="onnx")
    result = run(config.bundle, config.via, config.to, config.binary, config.threads, progress)
    if as_json:
        print_json("push", result.to_json())
    else:
        print("\n".join(result.lines()))
    if result.same_text:
        progress.note(f'next: edgespec generate {config.bundle} "..." {result.flags}')
    return 0 if result.same_text else 1


def _typed(prompt: bool) -> Iterator[str]:
    """Lines that the user types, without the empty ones."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no UTF-8 are told of, as in an argument
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if prompt else "").strip()
        except EOFError:
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            print()
            return
        if line:
            yield line


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = (
    (export, ExportConfig),
    (inspect, InspectConfig),
    (check, CheckConfig),
    (generate, GenerateConfig),
    (chat, ChatConfig),
    (tune, TuneConfig),
    (eval, EvalConfig),
    (build, BuildConfig),
    (push, PushConfig),
    *commands_draft.COMMANDS,
    *commands_trim.COMMANDS,
    *commands_latency.COMMANDS,
    *commands_bench.COMMANDS,
    *commands_vision.COMMANDS,
    *commands_stream.COMMANDS,
    *commands_recommend.COMMANDS,
)
# Words that stand before several commands, with their help.
GROUPS = {**commands_draft.GROUPS, **commands_latency.GROUPS, **commands_vision.GROUPS}
