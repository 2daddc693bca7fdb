"""A bundle's image encoder: checked against the checkpoint, counted, compiled, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from edgespec.bundle import Bundle, creating, open_bundle
from edgespec.cli import main
from edgespec.config import ExportConfig
from edgespec.errors import BundleError, InputError
from edgespec.exporters import export
from edgespec.exporters.check import check
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.profiles import load, operators
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.spec import Manifest, vision_tensors
from edgespec.trace import parse_trace
from edgespec.work import of_bundle
from tests.helpers import tiny_vision, tiny_vlm
from tests.helpers.checkpoints import SIZES

SMALL: dict[str, Any] = {"budget": 64, "block": 32, "widths": (2,), "weights": "fp32"}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, images, and selectors of one of them."""
    folder = tmp_path_factory.mktemp("vlm")
    for kind in ("llava", "idefics3"):
        (folder / kind).mkdir()
        tiny_vlm.folder(folder / kind, kind)
    tiny_vision.images(folder / "images")
    given = ["--images", str(folder / "images"), "-o", str(folder / "selectors"), "--steps", "3", "--quiet"]
    assert main(["vision", "train-selector", str(folder / "llava"), *given]) == 0
    return folder


@pytest.fixture(scope="session")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Bundles, each exported once."""
    found: dict[str, Bundle] = {}

    def get(kind: str = "llava", **more: Any) -> Bundle:
        name = f"{kind} {sorted(more.items())}"
        if name not in found:
            out = tmp_path_factory.mktemp("out") / "bundle"
            config = ExportConfig(str(made / kind), str(out), **{**SMALL, **more})
            found[name] = export(config, Progress(quiet=True), Engine)
        return found[name]

    return get


def checked(bundle: Bundle, source: Path) -> dict[str, Any]:
    """The findings of a whole check, by name."""
    result = check(
        bundle, Engine, operators(bundle.manifest.device), str(source), progress=Progress(quiet=True)
    )
    return {finding.name: finding for finding in result.findings}


WAYS = [
    {},
    {"vision_keep": 0.5},
    {"vision_keep": 0.5, "vision_method": "tosa"},
    {"vision_flops": 0.8},
    {"device": "npu", "weights": "w8a16"},
]


@pytest.mark.parametrize("more", WAYS, ids=["whole", "merge", "tosa", "flops", "npu"])
def test_a_bundle_is_what_the_checkpoint_says(
    exported: Callable[..., Bundle], made: Path, more: dict[str, Any]
) -> None:
    if more.get("vision_method") == "tosa":
        more = more | {"vision_selectors": str(made / "selectors")}
    if "vision_flops" in more:
        more = more | {"vision_images": str(made / "images")}
    bundle = exported(**more)
    found = checked(bundle, made / "llava")
    assert all(finding.passed for finding in found.values()), found
    (entry,) = bundle.manifest.vision
    pruned = "vision_keep" in more or "vision_flops" in more
    assert entry.method == (more.get("vision_method", "merge") if pruned else "whole")
    assert bool(entry.keeps) == pruned
    likeness = found["vision numbers"].figures["likeness"]
    assert (likeness > 0.9999) == (not entry.keeps) and likeness > 0.3


def spoilt(bundle: Bundle, folder: Path, change: Callable[[onnx.ModelProto], None], file: str) -> Bundle:
    """The bundle with one graph changed."""
    with creating(folder) as staging:
        shutil.copytree(bundle.path, staging.path, dirs_exist_ok=True)
        (staging.path / "manifest.json").unlink()
        model = onnx.load(str(staging.path / file), load_external_data=False)
        change(model)
        onnx.save(model, str(staging.path / file))
        staging.finish(replace(bundle.manifest, files={}))
    return open_bundle(folder)


def test_other_features_and_unread_pictures_fail(
    exported: Callable[..., Bundle], made: Path, tmp_path: Path
) -> None:
    bundle = exported()

    def scaled(model: onnx.ModelProto) -> None:
        last = next(node for node in model.graph.node if "features" in node.output)
        last.output[0] = "before"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "more"))
        model.graph.node.append(onnx.helper.make_node("Mul", ["before", "more"], ["features"]))

    found = checked(spoilt(bundle, tmp_path / "scaled", scaled, "vision.onnx"), made / "llava")
    assert not found["vision numbers"].passed and "off by 1." in found["vision numbers"].detail

    def blind(model: onnx.ModelProto) -> None:
        where = next(n for n in model.graph.node if n.op_type == "Where" and "features" in n.input)
        where.input[1] = where.input[2]

    found = checked(spoilt(bundle, tmp_path / "blind", blind, "target-embeds.onnx"), made / "llava")
    assert not found["vision rows"].passed and found["vision numbers"].passed


def test_inspect_and_estimate_count_it(
    exported: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported()
    assert main(["inspect", str(bundle.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    graph = next(g for g in told["graphs"] if g["model"] == "vision")
    held = next(m for m in told["models"] if m["model"] == "vision")
    # Products of a CLIP encoder of 3 used layers of 32, 17 tokens, and of the projector over 16 of them.
    layer = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 17 * 17 * 32
    whole = 3 * layer + 2 * 16 * (3 * 7 * 7 * 32) + 2 * 16 * (32 * 64 + 64 * 64)
    assert graph["ops_weights"] == whole
    assert held["bytes_weights"] == bundle.manifest.files["vision.data"].bytes
    times = []
    for images in ("0", "2"):
        line = ["estimate", str(bundle.path), "--profile", "snapdragon-8-elite", "--images", images, "--json"]
        assert main(line) == 0
        times.append(json.loads(capsys.readouterr().out))
    lines = [{line["name"]: line for line in said["prompt_lines"]} for said in times]
    assert "pictures" not in lines[0] and lines[1]["pictures"]["calls"] == 2
    assert lines[1]["prefill"]["calls"] == lines[0]["prefill"]["calls"] + 1  # 32 rows more
    assert times[1]["ttft_s"] > times[0]["ttft_s"] and times[0]["memory"] == times[1]["memory"]


def test_a_graph_without_shapes_is_no_bug(
    exported: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bare(model: onnx.ModelProto) -> None:
        del model.graph.value_info[:]

    bundle = spoilt(exported(), tmp_path / "bare", bare, "vision.onnx")
    assert main(["inspect", str(bundle.path), "--quiet"]) == 2
    assert "the image encoder's graph lacks shapes" in capsys.readouterr().err


def test_a_trace_with_pictures_replays(exported: Callable[..., Bundle]) -> None:
    from edgespec.replay import replay

    bundle = exported(draft="layers", draft_budget=64)
    calls = [["vision", "vision", 16, 16, 9.0], ["target", "embeds", 32, 20, 9.0]]
    prompt = {"event": "prompt", "tokens": 20, "known": 0, "time_s": 1, "calls": calls}
    first = {"event": "round", "tokens": [7], "drafted": 0, "accepted": 0, "calls": []}
    drafted = [
        ["draft", "prefill", 32, 4, 1.0],
        ["draft", "draft", 2, 1, 1.0],
        ["target", "verify", 2, 2, 1.0],
    ]
    second = {"event": "round", "tokens": [8, 9], "drafted": 1, "accepted": 1, "calls": drafted}
    run = replay(parse_trace(map(json.dumps, (prompt, first, second))), load("snapdragon-8-elite"), bundle)
    part = next(p for p in run.parts if p.model == "vision")
    assert part.calls == 1 and part.ops > 0 and run.ttft_s > part.time_s > 0
    assert of_bundle(bundle)["vision"].steps["vision", 16, 0].bytes_weights > 0


def test_an_executorch_bundle_sees_the_same(exported: Callable[..., Bundle], made: Path) -> None:
    pytest.importorskip(
        "executorch", reason="ExecuTorch is not installed (EDGESPEC_EXECUTORCH=1 scripts/setup)"
    )
    from edgespec.exporters.images import Sight
    from edgespec.runtime.session import Runtime, Settings

    bundle = exported("idefics3", format="executorch", vision_keep=0.6)
    found = checked(bundle, made / "idefics3")
    assert all(finding.passed for finding in found.values()), found
    texts = []
    for one in (bundle, exported("idefics3", vision_keep=0.6)):
        with Runtime.open(one.path, threads=1) as runtime:
            (entry,) = one.manifest.vision
            runtime.sight = Sight(one.path / entry.processor, entry)
            picture = sorted((made / "images").iterdir())[0]
            texts.append(runtime.session().generate("hello", Settings(12), images=[picture]).tokens)
    assert texts[0] == texts[1] and len(texts[0]) > 1


@pytest.mark.parametrize("more", [{}, {"vision_keep": 0.5}], ids=["whole", "merge"])
def test_it_compiles_for_a_phone_and_gives_its_features(
    exported: Callable[..., Bundle], made: Path, more: dict[str, Any]
) -> None:
    pytest.importorskip(
        "onnxruntime_qnn", reason="Qualcomm's compiler is not installed (EDGESPEC_QNN=1 scripts/setup)"
    )
    from edgespec.exporters.check_qualcomm import check_qualcomm

    bundle = exported(device="npu", weights="fp16", soc=("8-elite",), **more)
    compiled = bundle.compiled("8-elite")
    assert compiled.contexts["vision"] == "8-elite/vision_qnn.bin" and "vision.onnx" in compiled.graphs
    found = check_qualcomm(bundle, Engine, (), None, Progress(quiet=True))
    assert all(finding.passed for finding in found), found
    assert "vision emulated" in {finding.name for finding in found}


def edited(made: Path, folder: Path, name: str, **changes: Any) -> Path:
    """A copy of the LLaVA checkpoint with keys of one of its JSON files changed."""
    shutil.copytree(made / "llava", folder)
    value = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(value))
    return folder


def test_checkpoints_that_cannot_be_exported_are_refused_by_name(made: Path, tmp_path: Path) -> None:
    def refused(source: Path, said: str, **more: Any) -> None:
        config = ExportConfig(str(source), str(tmp_path / "out"), **{**SMALL, **more})
        with pytest.raises(InputError, match=said):
            export(config.check(), Progress(quiet=True), Engine)
        assert not (tmp_path / "out").exists()

    refused(edited(made, tmp_path / "a", "config.json", model_type="paligemma"), "paligemma|PaliGemma|causal")
    refused(edited(made, tmp_path / "b", "config.json", vision_feature_layer=[-2, -1]), "2 layers")
    refused(edited(made, tmp_path / "c", "processor_config.json", patch_size=14), "16 each")
    small = {"crop_size": {"height": 14, "width": 14}}
    refused(edited(made, tmp_path / "d", "preprocessor_config.json", **small), "graph takes 3 x 28 x 28")
    (edited(made, tmp_path / "e", "config.json") / "processor_config.json").write_text("{")
    refused(tmp_path / "e", "cannot be used|not JSON")
    lacking = edited(made, tmp_path / "f", "config.json")
    tensors = load_file(lacking / "model.safetensors")
    gone = next(name for name in tensors if "vision_tower" in name and "layers.1." in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, lacking / "model.safetensors")
    refused(lacking, "lacks model.vision_tower.*layers.1.")
    refused(made / "llava", "selectors", vision_keep=0.5, vision_method="tosa")
    refused(made / "llava", "no patch is left out", vision_selectors=str(made / "selectors"))
    other = made / "idefics3"
    tosa = {"vision_keep": 0.5, "vision_method": "tosa", "vision_selectors": str(made / "selectors")}
    refused(other, "another model", **tosa)
    refused(tiny_vlm_text(tmp_path / "g"), "reads no images", vision_keep=0.5)
    refused(edited(made, tmp_path / "h", "config.json", vision_feature_layer=-9), "layer -9.*has 4")
    scaled = transformers.LlavaConfig(
        vision_config=tiny_vlm.config("llava").vision_config,
        text_config=transformers.GemmaConfig(**SIZES),
        image_token_id=tiny_vlm.IMAGE,
    )
    shutil.copytree(made / "llava", tmp_path / "i")
    transformers.LlavaForConditionalGeneration(scaled).save_pretrained(tmp_path / "i")
    refused(tmp_path / "i", "gemma scales the embedding of words")


def tiny_vlm_text(path: Path) -> Path:
    """A checkpoint that reads no images."""
    from tests.helpers.checkpoints import tiny_model, write_directory

    return write_directory(path, tiny_model("llama"))


def test_adapters_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    from edgespec.exporters.draft_checkpoint import open_draft

    folder = tiny_vlm.draft(tmp_path / "draft", made / "llava", 4)
    target = open_checkpoint(str(made / "llava"))
    whole = open_draft(str(folder), target)
    assert whole.adapter is not None and whole.adapter.rows == 4 and len(whole.weights.files) == 2
    config = ExportConfig(str(made / "idefics3"), str(tmp_path / "out"), draft=str(folder), **SMALL)
    assert export(config, Progress(quiet=True), Engine).manifest.vision[0].draft_rows == 4
    tiny_vlm.draft(folder, made / "llava", 3)
    config = ExportConfig(str(made / "llava"), str(tmp_path / "other"), draft=str(folder), **SMALL)
    with pytest.raises(InputError, match="cannot see 3 rows of a picture of 16"):
        export(config, Progress(quiet=True), Engine)
    (folder / "adapter.safetensors").write_bytes(b"no adapter")
    with pytest.raises(InputError, match=r"adapter.safetensors is no adapter"):
        open_draft(str(folder), target)
    save_file(
        {"linear.weight": load_file(folder / "model.safetensors")["model.norm.weight"][None]},
        folder / "adapter.safetensors",
    )
    with pytest.raises(InputError, match=r"not of schema edgespec.adapter/1"):
        open_draft(str(folder), target)


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with its image encoder's entry changed."""
    return replace(manifest, vision=(replace(manifest.vision[0], **changes),))


def tensors_of(manifest: Manifest, *sizes: int) -> Manifest:
    """The manifest with a graph of other tensors."""
    inputs, outputs = vision_tensors(*sizes)
    return changed(manifest, graph=replace(manifest.vision[0].graph, inputs=inputs, outputs=outputs))


FAULTS: list[tuple[Callable[[Manifest], Manifest], str]] = [
    (lambda m: replace(m, vision=()), "hold embeds graphs"),
    (lambda m: replace(m, vision=m.vision * 2), "2 image encoders"),
    (lambda m: changed(m, token=10**6), "vision.token: is 1000000"),
    (lambda m: changed(m, rows=0), "vision.rows"),
    (lambda m: changed(m, method="guess"), "vision.method"),
    (lambda m: changed(m, method="merge"), "vision.keeps"),
    (lambda m: changed(m, method="merge", keeps={"²": 4}), "vision.keeps"),
    (lambda m: changed(m, method="merge", keeps={"1": 99}), "counts of patches"),
    (lambda m: changed(m, selectors="vision.data"), "vision.selectors"),
    (lambda m: changed(m, draft_rows=2), "draft_rows"),
    (lambda m: changed(m, processor="elsewhere"), "elsewhere.*has no files"),
    (lambda m: changed(m, weights="other.data"), "other.data.*lacks"),
    (lambda m: tensors_of(m, 28, 8, 64), "must be"),
    (lambda m: changed(m, graph=replace(m.vision[0].graph, method="x")), "has the method"),
]


@pytest.mark.parametrize(("change", "said"), FAULTS, ids=[f[1][:20] for f in FAULTS])
def test_a_manifest_of_two_minds_is_refused(
    exported: Callable[..., Bundle], tmp_path: Path, change: Callable[[Manifest], Manifest], said: str
) -> None:
    bundle = exported()
    with pytest.raises(BundleError, match=said), creating(tmp_path / "spoilt") as staging:
        shutil.copytree(bundle.path, staging.path, dirs_exist_ok=True)
        (staging.path / "manifest.json").unlink()
        staging.finish(replace(change(bundle.manifest), files={}))


def test_generate_says_what_is_wrong_with_images(
    exported: Callable[..., Bundle], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported()
    (tmp_path / "text.png").write_text("no image")
    for image, said in (
        (tmp_path / "none.png", "is not a file"),
        (tmp_path / "text.png", "no image that can be read"),
    ):
        assert main(["generate", str(bundle.path), "--image", str(image), "hello", "--quiet"]) == 2
        assert said in capsys.readouterr().err
    good = sorted((made / "images").iterdir())
    line = ["generate", str(bundle.path), "--image", str(good[0]), "--image", str(good[1]), "a <image> b"]
    assert main([*line, "--quiet"]) == 2
    assert "1 marks for an image (<image>) and 2 images" in capsys.readouterr().err
    assert main([*line[:-1], "a <image> b <image>", "--max-new-tokens", "4", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["tokens_prompt"] > 32


def test_a_chat_shows_images_with_the_next_words(
    exported: Callable[..., Bundle],
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = sorted((made / "images").iterdir())[:2]
    typed = f"/image {first}\nhello\n/reset\nhello\n/reset\n/image {second}\nhello\n"
    typed += "/image\n/image /none.png\nhello\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
    line = ["chat", str(exported().path), "--json", "--quiet", "--max-new-tokens", "8"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert len({tuple(answer["tokens"]) for answer in answers}) == 3
    prompts = [answer["stats"]["tokens_prompt"] for answer in answers]
    assert prompts == [prompts[1] + 16, prompts[1], prompts[1] + 16]
    assert "none.png is no image that can be read" in err and "no image is named" in err


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_is_found_where_older_processors_keep_it(made: Path, tmp_path: Path, name: str) -> None:
    folder = edited(made, tmp_path / "a", "config.json")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    held = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(held | {"chat_template": template}))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "words alone: {{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))  # a processor's goes first
    assert open_checkpoint(str(folder)).tokenizer.chat_template == template
