"""The commands about image encoders, from a folder of images to a graph that a runtime runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from edgespec.cli import main
from edgespec.exporters import selector_training
from edgespec.exporters.images import open_image
from edgespec.exporters.tosa import BySelector, Merged, Pruned, flops
from edgespec.exporters.vision import kept_of, open_encoder, prepared
from edgespec.exporters.vision_budget import features, likeness, lost_alone, shared_out
from tests.helpers import tiny_vision


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, images and selectors.safetensors."""
    base = tmp_path_factory.mktemp("vision")
    tiny_vision.folder(base / "model")
    tiny_vision.images(base / "images")
    words = ["--steps", "60", "--rate", "0.02", "--batch", "4", "-q"]
    asked = [str(base / "model"), "--images", str(base / "images"), "-o", str(base / "selectors.safetensors")]
    assert main(["vision", "train-selector", *asked, *words]) == 0
    return base


def test_a_selector_learns_the_next_attention(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """KL to the true attention falls well below that of the attention before it; one seed, one file."""
    again = made / "again.safetensors"
    words = ["--steps", "60", "--rate", "0.02", "--batch", "4", "--json", "-q"]
    assert (
        main(
            [
                "vision",
                "train-selector",
                str(made / "model"),
                "--images",
                str(made / "images"),
                "-o",
                str(again),
                *words,
            ]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["kl_after"] < 0.8 * facts["kl_before"] and 0 < facts["overlap_after"] <= 1
    assert again.read_bytes() == (made / "selectors.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["merge", "tosa"])
@pytest.mark.parametrize("family", ["dinov2", "vit", "clip_vision_model"])
def test_an_encoder_learns_to_do_with_fewer_tokens(
    made: Path, tmp_path: Path, family: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its features come nearer the whole one's, and the folder that it is written to is read by the rest."""
    model, tuned, selectors = tmp_path / "model", tmp_path / "tuned", tmp_path / "s"
    tiny_vision.folder(model, family)
    images, how = ["--images", str(made / "images")], ["--method", method, "--keep", "0.5"]
    if method == "tosa":
        words = ["-o", str(selectors), "--steps", "5", "-q"]
        assert main(["vision", "train-selector", str(model), *images, *words]) == 0
        how = [*how, "--bypass", "plain"]
    chosen = ["--selectors", str(selectors)] if method == "tosa" else []
    words = ["--steps", "60", "--rate", "0.001", "--json", "-q", "-o", str(tuned)]
    capsys.readouterr()
    assert main(["vision", "tune", str(model), *images, *how, *chosen, *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    before, after = (facts[f"similarity_{when}"] for when in ("before", "after"))
    assert 1 - after < (0.95 if method == "merge" else 0.5) * (1 - before) and facts["flops"] < 1
    chosen = ["--selectors", str(tuned / "selectors.safetensors")] if method == "tosa" else []
    words = ["--json", "-q", "-o", str(tmp_path / "graph")]
    assert main(["vision", "export", str(tuned), *how, *chosen, *words, *images]) == 0
    assert json.loads(capsys.readouterr().out)["furthest_from_pytorch"] < 1e-4
    whole, new = (open_encoder(str(folder))[0] for folder in (model, tuned))
    assert torch.equal(whole.table, new.table) and torch.equal(whole.patch.weight, new.patch.weight)
    assert not torch.equal(whole.layers[0].q.weight, new.layers[0].q.weight)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("steps", ["1", "9", "11"])
def test_a_tuning_may_be_short(made: Path, tmp_path: Path, steps: str) -> None:
    words = ["--keep", "0.5", "--steps", steps, "--rate", "0.0005", "-q", "-o", str(tmp_path / "tuned")]
    assert main(["vision", "tune", str(made / "model"), "--images", str(made / "images"), *words]) == 0


def test_a_tuning_that_cannot_be(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, images, out = str(made / "model"), ["--images", str(made / "images")], str(tmp_path / "tuned")
    for words, said in (
        (["--keep", "1", "-o", out], "keep 1.0 is not 0.01 to 0.99"),
        (["--keep", "0.5", "-o", model], "exists"),
        (["--keep", "0.5", "-o", out, "--method", "tosa"], "chosen by selectors"),
        (["--keep", "0.5", "-o", out, "--selectors", str(made / "selectors.safetensors")], "no use for"),
        (["--keep", "0.5", "-o", str(tmp_path / "no" / "tuned")], "is not a folder"),
    ):
        assert said in refused(["tune", model, *images, *words], capsys)
    assert not list(tmp_path.iterdir())
    broken = tiny_vision.folder(tmp_path / "broken", layers=2)
    held = load_file(broken / "model.safetensors")
    held[next(name for name in held if "layer.1." in name and name.endswith("weight"))][0] = float("nan")
    save_file(held, broken / "model.safetensors", metadata={"format": "pt"})
    words = ["tune", str(broken), *images, "--keep", "0.5", "-o", out]
    assert "the loss of step 1 is nan" in refused(words, capsys)
    words = ["tune", model, *images, "--keep", "0.5", "--rate", "1", "--steps", "12", "-o", out]
    assert "no step of the training" in refused(words, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_eval_says_what_each_way_costs(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = made / "eval"
    words = ["--selectors", str(made / "selectors.safetensors"), "--keep", "0.75,0.25", "-q", "--json"]
    assert (
        main(
            ["vision", "eval", str(made / "model"), "--images", str(made / "images"), "-o", str(out), *words]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert json.loads((out / "vision.json").read_text())["rows"] == found["rows"]
    rows = {(r["method"], r["keep"]): r for r in found["rows"]}
    assert {m for m, _ in rows} == {"tosa", "random", "norm", "previous", "true", "merged", "merged, all"} | {
        f"{m}+nearest" for m in ("tosa", "random", "norm", "previous", "true")
    }
    for method in ("tosa", "true", "norm"):
        assert rows[method, 0.25]["similarity"] < rows[method, 0.75]["similarity"] < 1
        assert rows[method, 0.25]["flops"] < rows[method, 0.75]["flops"] < 1
    with Image.open(out / "kept.png") as picture:
        assert picture.width > 100


WORDS = {
    "whole": [],
    "keep": ["--keep", "0.5"],
    "plain": ["--keep", "0.5", "--bypass", "plain"],
    "flops": ["--flops", "0.8"],
    "merge": ["--keep", "0.6", "--method", "merge"],
    "merge-flops": ["--flops", "0.9", "--method", "merge"],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_graph_gives_the_encoders_features(made: Path, tmp_path: Path, words: list[str]) -> None:
    """ONNX Runtime against PyTorch on the images, all shapes fixed, no weights outside of the file."""
    merging = "merge" in words
    given = ["--images", str(made / "images")]
    given += [] if merging else ["--selectors", str(made / "selectors.safetensors")]
    assert (
        main(["vision", "export", str(made / "model"), "-o", str(tmp_path / "out"), *given, *words, "-q"])
        == 0
    )
    facts = json.loads((tmp_path / "out" / "vision.json").read_text())
    assert facts["furthest_from_pytorch"] < 1e-5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["vision.json", "vision.onnx"]
    encoder, pixels, digest = open_encoder(str(made / "model"))
    by = BySelector(selector_training.read(made / "selectors.safetensors", encoder, digest))
    keeps = {int(n): count for n, count in facts["keeps"].items()}
    assert bool(keeps) == bool(words)
    way = (
        Merged(encoder, keeps)
        if merging
        else Pruned(encoder, keeps, by, facts["bypass"])
        if keeps
        else encoder
    )
    assert facts["flops"] == flops(way) and facts["bypass"] == (
        "nearest" if keeps and way.bypass == "nearest" else "plain"
    )
    if "--flops" in words:
        assert facts["flops"] <= float(words[1]) * facts["flops_whole"]
    graph = onnx.load(tmp_path / "out" / "vision.onnx")
    onnx.checker.check_model(graph, full_check=True)
    shapes = [
        [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.graph.input, *graph.graph.output)
    ]
    assert shapes == [[1, 3, 28, 28], [1, encoder.tokens, 32]]
    assert not any(
        value.type.tensor_type.shape.dim[i].dim_param
        for value in graph.graph.value_info
        for i in range(len(value.type.tensor_type.shape.dim))
    )
    session = ort.InferenceSession(tmp_path / "out" / "vision.onnx", providers=["CPUExecutionProvider"])
    images = prepared(pixels, sorted((made / "images").glob("*.png"))[:3])
    for image in images:
        features = session.run(None, {"pixels": image[None].numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(features, way(image[None]).numpy(), atol=2e-5, rtol=1e-4)


def test_flops_are_taken_where_they_cost_least(made: Path) -> None:
    """Never over the limit, and no layer is pruned where all FLOPs are there."""
    encoder, pixels, digest = open_encoder(str(made / "model"))
    by = BySelector(selector_training.read(made / "selectors.safetensors", encoder, digest))
    test = prepared(pixels, sorted((made / "images").glob("*.png")))
    for part in (0.95, 0.85, 0.75):
        pruned = lambda keeps: Pruned(encoder, keeps, by, "nearest")  # noqa: E731
        keeps = shared_out(Pruned.layers(encoder), encoder, pruned, test, part)
        assert 0 < flops(Pruned(encoder, keeps, by, "nearest")) <= part * flops(encoder)
    layers = Merged.layers(encoder)
    assert shared_out(layers, encoder, lambda keeps: Merged(encoder, keeps), test, 1.0) == {}


@torch.no_grad()
def test_a_layer_alone_loses_what_the_whole_walk_says(made: Path) -> None:
    """Tokens before a layer are computed once for all counts: the same losses as from pixels each time."""
    encoder, pixels, digest = open_encoder(str(made / "model"))
    by = BySelector(selector_training.read(made / "selectors.safetensors", encoder, digest))
    test = prepared(
        pixels, sorted((made / "images").glob("*.png"))[:6]
    )  # no multiple of what is seen together
    whole = features(encoder, test)
    for kind, pruned in (
        (Pruned, lambda keeps: Pruned(encoder, keeps, by, "nearest")),
        (Merged, lambda keeps: Merged(encoder, keeps)),
    ):
        lost = lost_alone(kind.layers(encoder), encoder, pruned, test, (12, 9))
        assert list(lost) == list(kind.layers(encoder))
        for number, losses in lost.items():
            ways = (pruned({number: count}) for count in (12, 9))
            alone = [1 - likeness(way, test, whole)["similarity"] for way in ways]
            assert losses == pytest.approx(alone, abs=1e-5) and losses[1] > 0


@torch.no_grad()
def test_patches_drawn_as_kept_are_those_that_take_part(made: Path) -> None:
    """In a later layer too, where what is chosen depends on what was chosen before."""
    encoder, pixels, digest = open_encoder(str(made / "model"))
    by = BySelector(selector_training.read(made / "selectors.safetensors", encoder, digest))
    test = prepared(pixels, sorted((made / "images").glob("*.png"))[:3])
    way = Pruned(encoder, {1: 3, 3: 2}, by, "plain")
    found = kept_of(way, test)
    assert list(found) == [1, 3] and [places.shape for places in found.values()] == [(3, 4), (3, 3)]
    x, scores = encoder.layers[0](encoder.embed(test))
    after = way.through(1, encoder.layers[1], x, scores)
    changed = (after != x).any(-1)
    assert torch.equal(changed, torch.zeros_like(changed).scatter(1, found[1], True))
    x, scores = encoder.layers[2](after)
    assert torch.equal(found[3], way.chosen(3, encoder.layers[3], x, scores))


@pytest.mark.parametrize("method", ["tosa", "merge"])
def test_a_graph_compiles_for_a_phone(made: Path, tmp_path: Path, method: str) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="edgespec[qnn] is not installed")
    given = [] if method == "merge" else ["--selectors", str(made / "selectors.safetensors")]
    words = ["--method", method, "--keep", "0.5", "--soc", "8-elite", "-q"]
    assert main(["vision", "export", str(made / "model"), *given, *words, "-o", str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "vision.json").read_text())
    assert facts["compiled"]["soc"] == "8-elite" and facts["compiled"]["nodes"] >= 1


def test_images_of_all_kinds_are_made_rgb(tmp_path: Path) -> None:
    array = np.zeros((20, 30, 3), np.uint8)
    array[:, :15] = (200, 20, 20)
    plain = Image.fromarray(array)
    turned = plain.getexif()
    turned[0x0112] = 6  # to be turned a quarter
    plain.save(tmp_path / "turned.jpg", exif=turned)
    assert open_image(tmp_path / "turned.jpg").size == (20, 30)
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    red = np.asarray(open_image(tmp_path / "cmyk.jpg"))[10, 5]
    assert np.abs(red.astype(int) - (200, 20, 20)).max() < 40
    clear = plain.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert np.asarray(open_image(tmp_path / "clear.png")).min() == 255
    plain.convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(tmp_path / "deep.png")
    for name in ("grey.png", "deep.png"):
        assert open_image(tmp_path / name).mode == "RGB"


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_whole_models_encoder_is_taken(tmp_path: Path, family: str) -> None:
    """A folder with text and image models, as CLIP and SigLIP are published."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    name = {"clip": "CLIP", "siglip": "Siglip"}[family]
    config = getattr(transformers, f"{name}Config")(
        text_config=sizes | {"vocab_size": 99}, vision_config=sizes | {"image_size": 28, "patch_size": 7}
    )
    torch.manual_seed(0)
    whole = getattr(transformers, f"{name}Model")(config).eval()
    tiny_vision.folder(tmp_path, "vit")  # its processor
    whole.save_pretrained(tmp_path)
    encoder, pixels, _ = open_encoder(str(tmp_path))
    image = pixels([Image.new("RGB", (40, 50), "teal")])
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), whole.vision_model(image).last_hidden_state)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["vision", *words]) == 2
    return capsys.readouterr().err


def test_bad_images(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(made / "model"), str(tmp_path / "out")
    assert "is no folder of images" in refused(
        ["eval", model, "--images", str(tmp_path / "no"), "-o", out], capsys
    )
    folder = tmp_path / "images"
    folder.mkdir()
    assert "holds no images" in refused(["eval", model, "--images", str(folder), "-o", out], capsys)
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert "a.png is no image" in refused(["eval", model, "--images", str(folder), "-o", out], capsys)
    whole = (made / "images" / "00.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    assert "a.png is no image" in refused(["eval", model, "--images", str(folder), "-o", out], capsys)
    Image.new("1", (30_000, 30_000)).save(folder / "a.png")  # 110 kB that would be 2.7 GB
    assert "a.png is too large" in refused(["eval", model, "--images", str(folder), "-o", out], capsys)
    Image.new("1", (9_000, 9_000)).save(folder / "a.png")
    assert "(9000 x 9000 pixels)" in refused(["eval", model, "--images", str(folder), "-o", out], capsys)


def test_bad_models_and_selectors(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = ["--images", str(made / "images")], ["-o", str(tmp_path / "out")]
    assert "holds no config.json" in refused(["eval", str(tmp_path), *images, *out], capsys)
    bare = tiny_vision.folder(tmp_path / "bare", layers=2)
    (bare / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refused(["eval", str(bare), *images, *out], capsys)
    odd = tiny_vision.folder(tmp_path / "odd", size=5, layers=2)
    assert "no patch of 7" in refused(["eval", str(odd), *images, *out], capsys)
    other = tiny_vision.folder(tmp_path / "other", "vit", layers=2)
    chosen = ["--selectors", str(made / "selectors.safetensors"), "--keep", "0.5"]
    assert "trained for another model" in refused(["export", str(other), *chosen, *out], capsys)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((made / "selectors.safetensors").read_bytes()[:100])
    model = str(made / "model")
    assert "no file of selectors" in refused(
        ["export", model, "--selectors", str(damaged), "--keep", "0.5", *out], capsys
    )
    (tmp_path / "file").write_text("mine")
    for word in ("eval", "export"):
        said = refused([word, model, *images, "-o", str(tmp_path / "file")], capsys)
        assert "exists and is no folder" in said and (tmp_path / "file").read_text() == "mine"
    assert "chosen by selectors" in refused(["export", model, "--keep", "0.5", *out], capsys)
    merge = ["--method", "merge", *chosen]
    assert "no use for selectors" in refused(["export", model, *merge, *out], capsys)
    assert "give one of them" in refused(["export", model, *chosen, "--flops", "0.5", *images, *out], capsys)
    assert "FLOPs at least" in refused(
        ["export", model, *chosen[:2], "--flops", "0.3", *images, *out], capsys
    )
    assert "no list of parts" in refused(["eval", model, *images, *out, "--keep", "1.5"], capsys)
    held = load_file(other / "model.safetensors")
    held.pop(next(name for name in held if "layer.1." in name and name.endswith("bias")))
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    assert "(of 1 that it needs)" in refused(["eval", str(other), *images, *out], capsys)
    (other / "model.safetensors").write_bytes(b"no")
    assert "is no model that can be read" in refused(["eval", str(other), *images, *out], capsys)
    assert not (tmp_path / "out" / "vision.onnx").exists()
