"""Exported files: they give the detector's scores wherever they are run, or are not left behind."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file

from panda_lightning import DN2, PANDA, SPADE, PandaError, PatchCore, SampleWiseEarlyStopping
from panda_lightning.detectors.exported import from_checkpoint
from panda_lightning.pictures.loose import pointed_at
from panda_lightning.pictures.pixels import Intensity
from panda_lightning.tools import export, main
from tests.conftest import make_clouds, small_network
from tests.detectors.test_scoring import images, learned
from tests.pictures.files import png16
from tests.test_any_order import ADAPT, DETECTORS, trainer

EXAMPLE = Path(__file__).parents[2] / "examples/onnx_score.py"
FAMILIES = {
    "resnet18": 64,
    "mobilenetv2_050": 64,
    "mobilenetv3_small_050": 64,
    "regnetx_002": 64,
    "convnext_atto": 64,
}


def saved(detector, folder, tmp_path, **options):
    """The checkpoint of a detector that has learned."""
    learned(detector, images(folder, **options), tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def run_onnx(path, pictures):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": np.stack(pictures).transpose(0, 3, 1, 2)}), strict=True))


def test_a_file_makes_rectangles_of_pictures(tmp_path, folder):
    path = saved(PatchCore("panda_tiny", coreset=0.2), folder, tmp_path, image_size=[32, 64], crop="center")
    export.export(path, tmp_path / "detector.onnx")
    pictures = [np.random.default_rng(n).integers(0, 256, (50, 70, 3), dtype=np.uint8) for n in range(3)]
    found, wanted = run_onnx(tmp_path / "detector.onnx", pictures), from_checkpoint(path).score(pictures)
    np.testing.assert_allclose(found["score"], wanted.score, rtol=1e-4)
    assert found["map"].shape == wanted.maps.shape == (3, 32, 64)


def test_pictures_that_keep_their_shape_are_refused(tmp_path, folder):
    path = saved(DN2("panda_tiny"), folder, tmp_path, crop="none")
    with pytest.raises(PandaError, match="an exported file resizes all pictures to one size.*made with crop=none"):
        export.export(path, tmp_path / "detector.onnx")
    assert not (tmp_path / "detector.onnx").exists()


def facts(path):
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_gives_its_scores_elsewhere(tmp_path, folder, name):
    outliers = str(make_clouds(tmp_path / "clouds", 8)) if name == "PANDA-OE" else None
    path = saved(DETECTORS[name](), folder, tmp_path, outliers=outliers, calibration_fraction=0.4)
    proof = export.export(path, tmp_path / "detector.onnx", alpha=0.25)
    assert proof.images > 40
    assert proof.largest < 1e-5
    draw, detector = np.random.default_rng(0), from_checkpoint(path)
    for count, sides in ((1, (40, 40)), (5, (70, 33)), (3, (300, 100))):
        pictures = list(draw.integers(0, 256, (count, *sides, 3), dtype=np.uint8))
        expected = detector.score(pictures, alpha=0.25)
        found = run_onnx(tmp_path / "detector.onnx", pictures)
        np.testing.assert_allclose(found["score"], expected.score, rtol=1e-5, atol=1e-5 * abs(expected.score).max())
        np.testing.assert_allclose(found["p_value"], expected.p_value, rtol=1e-12)
        np.testing.assert_array_equal(found["anomalous"], expected.anomalous)
        assert ("map" in found) == (name in ("PatchCore", "SPADE"))
        if "map" in found:
            np.testing.assert_allclose(found["map"], expected.maps, atol=1e-5 * expected.maps.max())
    said = facts(tmp_path / "detector.onnx")
    assert said["detector"] == detector.method
    assert json.loads(said["certificate"])["largest"] == proof.largest
    assert json.loads(said["preprocessing"])["image_size"] == 32
    assert said["calibration"] == "4 normal images held out"
    assert said["alpha"] == "0.25"
    assert str(tmp_path) not in (tmp_path / "detector.onnx").read_bytes().decode("latin-1").replace(str(folder), "")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_networks(tmp_path, folder, name):
    torch.manual_seed(0)
    save_file(timm.create_model(name).state_dict(), tmp_path / "w.safetensors")
    detector = DN2(name, weights=str(tmp_path / "w.safetensors"))
    path = saved(detector, folder, tmp_path, image_size=FAMILIES[name])
    assert export.export(path, tmp_path / "detector.onnx", resizes=False).largest < 1e-4
    assert json.loads(facts(tmp_path / "detector.onnx")["network"])["architecture"] == name


def test_features_and_patches_of_a_vision_transformer(tmp_path, folder):
    detector = SPADE(small_network(tmp_path / "vit", "vit"), k=2, levels=(2, 4))
    path = saved(detector, folder, tmp_path, image_size=32)
    proof = export.export(path, tmp_path / "detector.onnx", pointed_at(folder / "test/stripe"), resizes=False)
    assert max(proof.largest, proof.largest_map) < 1e-4


@pytest.mark.parametrize(("method", "ending"), [(PatchCore, "onnx"), (SPADE, "pt2")])
def test_tiles_that_overlap_are_part_of_the_graph(tmp_path, folder, method, ending):
    detector = method("panda_tiny", levels=(2, 3), tile=64, overlap=32)
    path = saved(detector, folder, tmp_path, image_size=100)  # the last tiles end beyond the border
    proof = export.export(path, tmp_path / f"detector.{ending}", pointed_at(folder / "test/stripe"), resizes=False)
    assert max(proof.largest, proof.largest_map) < 1e-5


def test_ses_has_the_networks_of_all_times(tmp_path, folder):
    (tmp_path / "ck").mkdir()
    detector, ses = PANDA(**ADAPT, ewc_weight=0), SampleWiseEarlyStopping(keep_snapshots=True)
    run = trainer(tmp_path)
    run.callbacks.append(ses)
    run.fit(detector, images(folder))
    path = next(tmp_path.rglob("ses")).parent / "last.ckpt"
    run.save_checkpoint(path)
    for half in (False, True):
        proof = export.export(path, tmp_path / f"{half}.onnx", half=half, resizes=not half)
        assert proof.largest < (1e-2 if half else 1e-5)
    shown = sorted((folder / "test").rglob("*.png"))
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in shown]
    found = run_onnx(tmp_path / "False.onnx", pictures)
    np.testing.assert_allclose(found["ses_score"], ses.score, rtol=1e-5)
    assert (tmp_path / "True.onnx").stat().st_size < 0.6 * (tmp_path / "False.onnx").stat().st_size
    (tmp_path / "copy.ckpt").write_bytes(path.read_bytes())  # without what SES kept beside it
    with pytest.warns(UserWarning, match="The file has no ses_score: SES scores new images with the networks saved"):
        export.export(tmp_path / "copy.ckpt", tmp_path / "copy.onnx")
    assert "ses_score" not in run_onnx(tmp_path / "copy.onnx", pictures)


@pytest.mark.parametrize("half", [False, True])
def test_a_torch_program_needs_torch_alone(tmp_path, folder, half):
    path = saved(DN2("panda_tiny"), folder, tmp_path, calibration_fraction=0.4)
    export.export(path, tmp_path / "detector.pt2", half=half)
    picture = folder / "test/stripe/000.png"
    code = (
        "import torch, numpy, sys; from PIL import Image\n"
        f"x = torch.tensor(numpy.asarray(Image.open({str(picture)!r}).convert('RGB'))).permute(2, 0, 1)[None]\n"
        f"print(*(float(t[0]) for t in torch.export.load({str(tmp_path / 'detector.pt2')!r}).module()(x)))\n"
        "assert 'panda_lightning' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=alone(tmp_path, "panda_lightning")
    )
    assert not done.returncode, done.stderr
    score, p_value = map(float, done.stdout.split())
    expected = from_checkpoint(path).score(picture)
    assert score == pytest.approx(expected.score[0], rel=1e-2 if half else 1e-5)
    assert p_value == expected.p_value[0]
    with ZipFile(tmp_path / "detector.pt2") as file:
        texts = {Path(name).name: json.loads(file.read(name)) for name in file.namelist() if name.endswith("e.json")}
    assert texts["certificate.json"]["images"] > 40
    extra = {"facts.json": "", "certificate.json": ""}
    torch.export.load(tmp_path / "detector.pt2", extra_files=extra)
    assert json.loads(extra["facts.json"])["detector"] == "DN2"
    assert json.loads(extra["certificate.json"]) == texts["certificate.json"]


def alone(tmp_path, *names):
    """An environment in which these packages cannot be imported."""
    for name in names:
        (tmp_path / "without").mkdir(exist_ok=True)
        (tmp_path / "without" / f"{name}.py").write_text("raise ImportError('it is not here')\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "without")}


def test_the_example_needs_neither_this_package_nor_torch(tmp_path, folder):
    path = saved(DN2("panda_tiny"), folder, tmp_path, calibration_fraction=0.4)
    export.export(path, tmp_path / "detector.onnx", alpha=0.25)
    picture = folder / "test/stripe/000.png"
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(picture).convert("RGB").resize((60, 40)).save(turned, exif=exif)
    done = subprocess.run(
        [sys.executable, EXAMPLE, "detector.onnx", picture, turned], capture_output=True, text=True, cwd=tmp_path,
        env=alone(tmp_path, "panda_lightning", "torch", "timm"),
    )  # fmt: skip
    assert not done.returncode, done.stderr
    expected = from_checkpoint(path).score([str(picture), str(turned)], alpha=0.25)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(deep)
    done_deep = subprocess.run(
        [sys.executable, EXAMPLE, "detector.onnx", deep], capture_output=True, text=True, cwd=tmp_path,
        env=alone(tmp_path, "panda_lightning", "torch", "timm"),
    )  # fmt: skip
    assert done_deep.returncode
    assert "deep.png has more than 8 bits a value" in done_deep.stderr
    png16(tmp_path / "deep.png", np.zeros((9, 9, 3)))
    done_deep = subprocess.run(
        [sys.executable, EXAMPLE, "detector.onnx", deep], capture_output=True, text=True, cwd=tmp_path,
        env=alone(tmp_path, "panda_lightning", "torch", "timm"),
    )  # fmt: skip
    assert "deep.png has more than 8 bits a value" in done_deep.stderr
    for line, score, p in zip(done.stdout.splitlines(), expected.score, expected.p_value, strict=True):
        words = line.split()
        assert float(words[words.index("score") + 1]) == pytest.approx(score, rel=1e-5)
        assert float(words[words.index("p_value") + 1]) == pytest.approx(p)


@pytest.mark.parametrize(("kind", "what"), [("onnx", "weight"), ("onnx", "bank row"), ("pt2", "bank row")])
def test_a_file_that_was_damaged_is_not_left_behind(tmp_path, folder, monkeypatch, capsys, what, kind):
    path = saved(DN2("panda_tiny"), folder, tmp_path)
    output = tmp_path / f"out/detector.{kind}"

    def damaged(program, whole, file, size, opset, real=export.write):
        if kind == "onnx":
            real(program, whole, file, size, opset)
            model = onnx.load(file)
            tensor = next(t for t in model.graph.initializer if suits(list(t.dims)))
            values = numpy_helper.to_array(tensor).copy()
            change(values)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            onnx.save(model, file)
        else:
            name = next(name for name, t in program.constants.items() if suits(list(t.shape)))
            program.constants[name] = program.constants[name].detach().clone()  # the detector's own stays
            change(program.constants[name])
            real(program, whole, file, size, opset)

    def suits(shape):
        return shape == [11, 256] if what == "bank row" else len(shape) == 4 and shape[0] > 100

    def change(values):
        if what == "bank row":
            values[3] += 1e-4
        else:
            values[0, 0, 1, 1] += 5

    monkeypatch.setattr(export, "write", damaged)
    with pytest.raises(SystemExit) as ended:
        main(["export", f"--ckpt_path={path}", "-o", str(output), f"--format={'onnx' if kind == 'onnx' else 'torch'}",
              f"--verify={folder / 'train'}", "--input=final"])  # fmt: skip
    said = "its bank is not that of the detector" if what == "bank row" else "score of picture"
    assert f"is not kept, because it does not give the detector's scores: {said}" in str(ended.value.code)
    assert not list(output.parent.iterdir())


def test_the_command_compares_with_given_pictures_and_takes_them_at_their_final_size(tmp_path, folder, capsys):
    path = saved(DN2("panda_tiny"), folder, tmp_path)
    (folder / "test/spot/broken.png").write_text("no picture")
    words = ["export", f"--ckpt_path={path}", "-o", str(tmp_path / "d.onnx"), f"--verify={folder / 'test'}"]
    assert main([*words, "--input=final", "--opset=18"]) == 0
    out = capsys.readouterr().out
    assert "DN2 as 4.9 MiB, which gives score, p_value" in out
    assert "13 pictures (14 given) agree in onnxruntime" in out
    model = onnx.load(tmp_path / "d.onnx")
    assert model.opset_import[0].version == 18
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims[1:]] == [3, 32, 32]
    assert json.loads(facts(tmp_path / "d.onnx")["preprocessing"])["resized inside"] is False


def test_large_files_keep_their_weights_beside_them(tmp_path, folder, monkeypatch):
    path = saved(DN2("panda_tiny"), folder, tmp_path)
    monkeypatch.setattr(export, "LARGEST", 1000)
    output = tmp_path / "out/detector.onnx"
    export.export(path, output)
    assert {file.name for file in output.parent.iterdir()} == {"detector.onnx", "detector.onnx.data"}
    assert output.stat().st_size < 1e6 < (tmp_path / "out/detector.onnx.data").stat().st_size
    picture = np.asarray(Image.open(folder / "test/stripe/000.png").convert("RGB"))
    expected = from_checkpoint(path).score(picture).score
    np.testing.assert_allclose(run_onnx(output, [picture])["score"], expected, rtol=1e-5)


def test_a_mixed_precision_run_is_exported_in_float32_without_its_calibration(tmp_path, folder, caplog):
    caplog.set_level("INFO")
    detector = PANDA(**ADAPT, ewc_weight=0)
    run = type(trainer(tmp_path))(
        accelerator="cpu", precision="bf16-mixed", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(detector, images(folder, calibration_fraction=0.4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    proof = export.export(tmp_path / "last.ckpt", tmp_path / "d.onnx", resizes=False)
    assert caplog.text.count("scored in bf16-mixed; the file scores in float32, without p-values") == 1
    assert facts(tmp_path / "d.onnx")["calibration"] == "none"
    assert proof.largest < 1e-5


def refused(tmp_path, *words):
    with pytest.raises(SystemExit) as ended:
        main(["export", "-o", str(tmp_path / "out/d.onnx"), *words])
    assert not list((tmp_path / "out").glob("*"))
    return str(ended.value.code)


def test_what_cannot_be_exported_ends_in_a_sentence(tmp_path, folder, monkeypatch):
    path = saved(DN2("panda_tiny"), folder, tmp_path)
    given = f"--ckpt_path={path}"
    assert "nowhere.ckpt is not a file" in refused(tmp_path, f"--ckpt_path={tmp_path / 'nowhere.ckpt'}")
    (tmp_path / "broken.ckpt").write_bytes(path.read_bytes()[:5000])
    assert "is broken" in refused(tmp_path, f"--ckpt_path={tmp_path / 'broken.ckpt'}")
    assert "choose a name that ends in .pt2" in refused(tmp_path, given, "--format=torch")
    assert "--opset=99 is too new for onnxruntime" in refused(tmp_path, given, "--opset=99")
    (tmp_path / "empty").mkdir()
    assert "there are no images in" in refused(tmp_path, given, f"--verify={tmp_path / 'empty'}")
    (tmp_path / "empty/x.png").write_text("no picture")
    assert "none of the 1 pictures of --verify can be read: name others" in refused(
        tmp_path, given, f"--verify={tmp_path / 'empty'}"
    )
    assert "alpha=0.001 needs 999 calibration images" in refused(tmp_path, given, "--alpha=0.001")
    monkeypatch.setattr(
        "panda_lightning.tools.export.find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    assert "onnxscript, not installed here: `pip install 'panda-lightning[export]'`" in refused(tmp_path, given)


def test_values_of_8_bits_pass_a_window_once(tmp_path, folder):
    path = saved(DN2("panda_tiny"), folder, tmp_path, intensity="window:30,200")
    proof = export.export(path, tmp_path / "d.onnx", pointed_at(folder / "test"))
    assert proof.largest < 1e-5
    assert "window:LO,HI maps the values of every picture" in facts(tmp_path / "d.onnx")["input"]
    file = folder / "test/stripe/000.png"
    picture = Intensity.parse("window:30,200").shallow(Image.open(file).convert("RGB"))
    expected = from_checkpoint(path).score(file).score
    np.testing.assert_allclose(run_onnx(tmp_path / "d.onnx", [np.asarray(picture)])["score"], expected, rtol=1e-5)


class Rooted(DN2):
    """A user's own, whose scores are others."""

    def anomaly_score(self, batch):
        return super().anomaly_score(batch).sqrt()


def test_a_class_of_the_users_own_is_itself_and_never_one_of_ours(tmp_path, folder):
    path = saved(Rooted("panda_tiny"), folder, tmp_path)
    export.export(path, tmp_path / "own.onnx")
    picture = np.asarray(Image.open(folder / "test/stripe/000.png").convert("RGB"))
    expected = from_checkpoint(path).score(picture).score
    assert expected[0] < 100  # a root
    np.testing.assert_allclose(run_onnx(tmp_path / "own.onnx", [picture])["score"], expected, rtol=1e-5)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "elsewhere.DN2"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(PandaError, match=r"is a checkpoint of elsewhere\.DN2, which is not a known detector"):
        from_checkpoint(tmp_path / "other.ckpt")


def test_an_output_that_exists_stays(tmp_path, folder):
    path = saved(DN2("panda_tiny"), folder, tmp_path)
    for name in ("d.onnx", "d.onnx.data"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SystemExit) as ended:
            main(["export", f"--ckpt_path={path}", "-o", str(tmp_path / "d.onnx")])
        assert f"{name} exists: choose another --output, or remove it" in str(ended.value.code)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_a_checkpoint_of_another_class_or_without_a_bank_is_refused(tmp_path, folder):
    path = saved(DN2("panda_tiny"), folder, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "somebody.Elses"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(PandaError, match=r"is a checkpoint of somebody.Elses, which is not a known detector .*DN2, "):
        export.export(tmp_path / "other.ckpt", tmp_path / "d.onnx")
    checkpoint["hyper_parameters"]["_class_path"] = "panda_lightning.DN2"
    checkpoint["state_dict"]["_extra_state"]["derived"]["bank"] = None
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(PandaError, match="has no bank of normal images for its weights"):
        export.export(tmp_path / "bare.ckpt", tmp_path / "d.onnx")
