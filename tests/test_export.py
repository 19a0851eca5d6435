"""Exported networks answer as the original does, say what they need, and are not written when they do not."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, TINY
from torch import Tensor, nn

import kdcli
from kdcli import checkpoint, export
from kdcli.export import formats
from kdcli.export.artefact import Artefact, Facts, opened
from kdcli.export.graph import Deployed, plain
from kdcli.inference import Classifier, Use
from kdcli.models import build

STUDENT = ["distill", "--method", "kd", "--student", "resnet8", *TINY, "--max-steps", "4"]


@pytest.fixture(scope="module")
def made(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student of kd, `plain`, whose teacher is there."""
    from kdcli.__main__ import run

    folder = tmp_path_factory.mktemp("made")
    assert run([*STUDENT, "--teacher", str(teachers / "kd"), "--quiet", "--out", str(folder / "plain")]) == 0
    return folder


@pytest.fixture(params=["onnx", "torch"])
def graph(request: pytest.FixtureRequest) -> str:
    """The two formats that hold a graph."""
    if request.param == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra kdcli[onnx] is not installed")
        pytest.importorskip("onnxscript", reason="the extra kdcli[onnx] is not installed")
    return str(request.param)


def pixels(n: int, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def answer(path: Path, images: Tensor) -> Tensor:
    """What a file answers in its own runtime, without anything of kd's."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        return torch.export.load(str(path)).module()(images)


@pytest.mark.parametrize(
    ("inputs", "outputs", "inference"),
    [
        ("float", "logits", "single"),
        ("uint8", "probabilities", "single"),
        ("float", "probabilities", "marginal"),
        ("uint8", "logits", "aggregate"),
    ],
)
def test_a_joint_head_answers_alike_in_every_way(inputs, outputs, inference, graph, kd, teachers, tmp_path):
    """Any number of images, either kind of pixels, logits or probabilities of the K classes, all three inferences."""
    suffix = {"onnx": ".onnx", "torch": ".pt2"}[graph]
    out = tmp_path / f"net{suffix}"
    words = ["--inputs", inputs, "--outputs", outputs, "--inference", inference, "--images", 40]
    result = kd("export", teachers / "vsd", "--out", out, *words, "--json")
    assert result.code == 0, result.err
    document = result.json
    assert document["format"] == graph
    assert document["bytes"] == out.stat().st_size
    assert document["check"]["source"] == "test images of digits"
    assert document["check"]["images"] == 40
    assert document["check"]["equal_argmax"] == 100
    assert document["check"]["max_difference"] < 1e-4
    original = kdcli.load(teachers / "vsd", inference)
    for n in (1, 3, 9):
        images = pixels(n)
        with torch.no_grad():
            wanted = original(images)
        wanted = wanted.softmax(1) if outputs == "probabilities" else wanted
        found = answer(out, images if inputs == "uint8" else images / 255)
        assert found.shape == (n, 10)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_safetensors_is_a_kd_checkpoint_of_the_classifier_alone(kd, teachers, tmp_path):
    """No heads, K outputs, the same answers; evaluating it gives the original's accuracy."""
    out = tmp_path / "plain.safetensors"
    result = kd("export", teachers / "vsd", "--out", out, "--json")
    assert result.code == 0, result.err
    metadata = checkpoint.read_metadata(out)
    assert metadata["arch"]["outputs"] == 10
    assert "heads" not in metadata
    assert metadata["inference"] == {"transform": "none", "scale": 2, "scale_mode": "bilinear"}
    assert metadata["preprocessing"]["size"] == metadata["image_size"] == 8
    assert metadata["preprocessing"]["resize_shorter_side"] == metadata["resize"] == 8
    assert metadata["source"] == checkpoint.digest(teachers / "vsd")
    with torch.no_grad():
        torch.testing.assert_close(kdcli.load(out)(pixels(5)), kdcli.load(teachers / "vsd")(pixels(5)))
    ours, theirs = (kd("evaluate", path, "--threads", 1, "--json").json for path in (out, teachers / "vsd"))
    assert ours["metrics"]["test"]["top1"] == theirs["metrics"]["test"]["top1"]
    assert result.json["cost"]["params"] < theirs["cost"]["params"]
    assert kd("verify", out).code == 0


def test_the_file_says_what_it_needs(kd, made, tmp_path, graph):
    """Class names, size, resizing and normalisation are in the file, for those who have no kd."""
    out = tmp_path / {"onnx": "net.onnx", "torch": "net.pt2"}[graph]
    assert kd("export", made / "plain", "--out", out, "--random-images", "--images", 4).code == 0
    if graph == "onnx":
        import onnx

        model = onnx.load(out)
        onnx.checker.check_model(model, full_check=True)
        text = next(entry.value for entry in model.metadata_props if entry.key == "kd")
        assert [(one.domain, one.version) for one in model.opset_import] == [("", formats.OPSET)]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    else:
        extra = {"kd.json": ""}
        torch.export.load(str(out), extra_files=extra)
        text = extra["kd.json"]
    facts = json.loads(text)
    assert facts["classes"] == [str(i) for i in range(10)]
    assert (facts["image_size"], facts["resize"], facts["inputs"], facts["outputs"]) == (8, 8, "float", "logits")
    assert facts["normalization"]["mean"] == [0.3057] * 3
    assert facts["preprocessing"]["colours"] == "RGB"
    assert facts["source"] == checkpoint.digest(made / "plain")


def test_the_teacher_stands_beside_it(kd, made, teachers, tmp_path):
    """Size, parameters, MACs and times, of the run's own teacher; gone or replaced, it is left out with a note."""
    out = tmp_path / "s.safetensors"
    words = ["export", made / "plain", "--out", out, "--images", 4]
    document = kd(*words, "--json").json
    teacher = document["teacher"]
    assert teacher["arch"] == "resnet14"
    assert teacher["digest"] == checkpoint.digest(teachers / "kd")
    assert teacher["params"] > document["cost"]["params"]
    assert teacher["macs"] > document["cost"]["macs"]
    assert set(teacher["ms_per_image"]) == set(document["cost"]["ms_per_image"]) == {"1", "32"}
    assert all(value > 0 for value in [*teacher["ms_per_image"].values(), *document["cost"]["ms_per_image"].values()])
    assert "teacher resnet14" in kd(*words).out
    tensors, metadata = checkpoint.load(made / "plain/student.safetensors")
    for named in (tmp_path / "gone.safetensors", teachers / "vsd"):
        changed = {**metadata, "teacher": {**metadata["teacher"], "checkpoint": str(named)}}
        checkpoint.save(tmp_path / "other.safetensors", tensors, changed)
        result = kd("export", tmp_path / "other.safetensors", "--out", out, "--images", 4, "--json")
        assert result.code == 0
        assert "teacher" not in result.json
        assert "nothing about the teacher" in result.err
    told = kd("export", tmp_path / "other.safetensors", "--out", out, "--teacher", teachers / "kd", "--json").json
    assert told["teacher"]["digest"] == checkpoint.digest(teachers / "kd")


def test_a_teacher_that_is_not_there_keeps_the_file_from_being_written(kd, made, tmp_path):
    """Asked for by name, it is an input like the network itself: exit 3, before anything is made."""
    result = kd("export", made / "plain", "--out", "net.safetensors", "--teacher", "gone.safetensors")
    assert result.code == 3
    assert not (tmp_path / "net.safetensors").exists()


def test_nothing_says_where_things_lay(kd, made, tmp_path, graph):
    """A folder, a teacher and a method's file have names in what is shipped, and no paths."""
    tensors, metadata = checkpoint.load(made / "plain/student.safetensors")
    changed = metadata | {"dataset": f"folder:{tmp_path}/photos", "method": {"name": f"{tmp_path}/mine.py", "alpha": 1}}
    checkpoint.save(tmp_path / "here.safetensors", tensors, changed)
    suffix = {"onnx": "onnx", "torch": "pt2"}[graph]
    for name in (f"out.{suffix}", "out.safetensors"):
        assert kd("export", "here.safetensors", "--out", name, "--images", 2).code == 0
        content = (tmp_path / name).read_bytes()
        assert str(tmp_path).encode() not in content
        assert str(ROOT).encode() not in content
        assert b"site-packages" not in content
    shipped = checkpoint.read_metadata(tmp_path / "out.safetensors")
    assert shipped["dataset"] == "folder:photos"
    assert shipped["method"] == {"name": "mine.py", "alpha": 1}
    assert shipped["teacher"]["digest"] == metadata["teacher"]["digest"]
    assert "checkpoint" not in shipped["teacher"]
    with torch.no_grad():
        assert torch.equal(kdcli.load("out.safetensors")(pixels(3)), kdcli.load(made / "plain")(pixels(3)))


def test_random_images_where_there_are_no_others(kd, made, tmp_path):
    """The data set may be gone, or have other classes by now."""
    tensors, metadata = checkpoint.load(made / "plain/student.safetensors")
    for change in ({"dataset": "folder:nowhere"}, {"classes": [f"class {i}" for i in range(10)]}):
        checkpoint.save(tmp_path / "moved.safetensors", tensors, metadata | change)
        result = kd("export", tmp_path / "moved.safetensors", "--out", "out.safetensors", "--images", 5, "--json")
        assert result.code == 0
        assert result.json["check"]["source"] == "random images"
        assert "checking on random images" in result.err


# ------------------------------------------------------------------------------------------------------ what is refused


class _Off(Deployed):
    """A graph with a mistake in it."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + 0.01 * torch.arange(logits.shape[1])


def test_a_graph_that_answers_differently_is_not_written(kd, made, tmp_path, monkeypatch):
    """Exit 4 with the difference; what was at --out before is still there."""
    monkeypatch.setattr(formats, "deployed", lambda classifier, facts: _Off(classifier, probabilities=False).eval())
    out = tmp_path / "net.pt2"
    out.write_text("mine")
    result = kd("export", made / "plain", "--out", out, "--json")
    assert result.code == 4
    assert "differ by up to 0.09" in result.error
    assert out.read_text() == "mine"
    assert result.json["error"]["kind"] == "incompatible"


def test_a_graph_of_nan_is_not_written(kd, made, tmp_path, monkeypatch):
    """NaN compares with nothing, and must not pass for equal."""

    class Lost(Deployed):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * float("nan")

    monkeypatch.setattr(formats, "deployed", lambda classifier, facts: Lost(classifier, probabilities=False).eval())
    assert kd("export", made / "plain", "--out", "net.pt2", "--images", 2).code == 4
    assert not (tmp_path / "net.pt2").exists()


def test_a_graph_that_fails_on_one_image_alone_is_not_written(kd, made, tmp_path, monkeypatch):
    """The last image is compared by itself too, and NaN there is a difference like any other."""
    opened = export.opened

    def of_batches(kind, content, name):
        artefact = opened(kind, content, name)
        nan = torch.full((1, 10), float("nan"))
        return Artefact(artefact.facts, lambda images: nan if len(images) == 1 else artefact.run(images))

    monkeypatch.setattr(export, "opened", of_batches)
    result = kd("export", made / "plain", "--out", "net.pt2", "--images", 4)
    assert result.code == 4
    assert "differ by up to nan" in result.error
    assert not (tmp_path / "net.pt2").exists()


def test_a_network_that_cannot_be_traced_is_one_line(kd, made, tmp_path, monkeypatch):
    """Exit 4, with the way out."""

    class Deciding(Deployed):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) if images.sum().item() > 0 else images.sum((2, 3))

    monkeypatch.setattr(formats, "deployed", lambda classifier, facts: Deciding(classifier, probabilities=False).eval())
    result = kd("export", made / "plain", "--out", "net.pt2", "--images", 2)
    assert result.code == 4
    assert "cannot be exported to torch" in result.error
    assert "--format safetensors" in result.error


def test_without_the_extra_there_is_a_hint(kd, made, monkeypatch):
    """Exit 2 and what to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = kd("export", made / "plain", "--out", "net.onnx")
    assert result.code == 2
    assert "kdcli[onnx]" in result.error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "net.bin"], "name it *.safetensors, *.onnx, *.pt2"),
        (["--out", "net.pt", "--format", "torch"], "net.pt2"),
        (["--out", "net.onnx", "--format", "tflite"], "no format 'tflite'"),
        (["--out", "net.pt2", "--opset", "23"], "no opset 23 for torch"),
        (["--out", "net.onnx", "--opset", "5"], "no opset 5"),
        (["--out", "net.pt2", "--inputs", "double"], "uint8"),
        (["--out", "net.pt2", "--outputs", "logit"], "did you mean logits?"),
        (["--out", "net.safetensors", "--outputs", "probabilities"], "holds weights"),
        (["--out", "net.pt2", "--inference", "aggregate"], "it has single"),
    ],
)
def test_what_there_is_not_is_refused(words, says, kd, made, tmp_path):
    """Exit 2 before anything is made."""
    result = kd("export", made / "plain", *words)
    assert result.code == 2
    assert says in result.error
    assert not list(tmp_path.glob("net.*"))


def test_the_network_itself_is_never_overwritten(kd, made):
    """By whatever name --out reaches it."""
    source = made / "plain/student.safetensors"
    before = source.read_bytes()
    result = kd("export", made / "plain", "--out", made / "plain/../plain/student.safetensors")
    assert result.code == 2
    assert source.read_bytes() == before


@pytest.mark.parametrize(("name", "code"), [("folder.pt2", 5), ("missing/net.pt2", 5)])
def test_where_it_cannot_be_written(name, code, kd, made, tmp_path):
    """A directory in the way, or none to write in: exit 5 and nothing left behind."""
    (tmp_path / "folder.pt2").mkdir()
    result = kd("export", made / "plain", "--out", name, "--images", 2)
    assert result.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


# ------------------------------------------------------------------------------------------------------- other networks

FACTS = {
    "classes": [f"{i}" for i in range(5)],
    "image_size": 32,
    "resize": 32,
    "inputs": "float",
    "outputs": "logits",
    "inference": "single",
    "arch": "x",
    "dataset": None,
    "normalization": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
    "preprocessing": {},
    "source": "",
}
NETWORKS = ["vgg8", "shufflenetv1", "mobilenetv2", "torchvision:squeezenet1_1", "timm:mobilenetv3_small_050"]


def classifier(name: str, outputs: int = 5, transform: str = "none", size: int = 32) -> Classifier:
    torch.manual_seed(0)
    metadata = {"classes": FACTS["classes"], "image_size": size, "normalization": FACTS["normalization"]}
    return Classifier(build(name, outputs, size).eval(), Use(transform), metadata).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_becomes_a_graph(name):
    """The registry's, the libraries' that are cut into stages, and those that are tapped by hooks."""
    _round_trip(name, "torch")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(
    "name",
    [
        *NETWORKS,
        *("wrn16_2", "resnet8x4", "shufflenetv2", "mobilenetv1", "resnet50", "torchvision:resnet18"),
        *("timm:vit_tiny_patch16_224", "timm:mixer_s16_224", "timm:swin_tiny_patch4_window7_224", "timm:convnext_atto"),
        *("timm:deit_tiny_distilled_patch16_224", "torchvision:mobilenet_v3_small", "timm:efficientnet_b0"),
    ],
)
def test_every_kind_of_network_in_both_formats(name, kind):
    """Among them token networks."""
    _round_trip(name, kind)


def _round_trip(name: str, kind: str) -> None:
    facts = Facts.model_validate(FACTS)
    original = classifier(name)
    module = formats.deployed(original, facts)
    content = formats.program(module, facts) if kind == "torch" else formats.onnx(module, facts, formats.OPSET)
    artefact = opened(kind, content, name)
    for n in (1, 4):
        with torch.no_grad():
            torch.testing.assert_close(artefact.run(pixels(n, 32)), original(pixels(n, 32)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "timm:vit_tiny_patch16_224", "torchvision:squeezenet1_1"])
def test_a_joint_head_is_cut_down_to_its_classes(name):
    """The rows y*4+0 of the last layer, and nothing else, changes."""
    joint = classifier(name, outputs=20, transform="rot4")
    small = plain(joint.network, 5)  # type: ignore[arg-type]
    assert small.outputs == 5
    with torch.no_grad():
        x = joint.preprocess(pixels(3, 32))
        torch.testing.assert_close(small(x), joint.network(x)[:, ::4])
        torch.testing.assert_close(small(x), joint(pixels(3, 32)))
    assert plain(small, 5) is small


def test_taps_leave_the_exported_copy_and_stay_on_the_original():
    """The hooks of a tapped network would put traced tensors into a dictionary that outlives the trace."""
    original = classifier("torchvision:squeezenet1_1")
    module = Deployed(original, probabilities=True)

    def hooks(net: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())

    assert hooks(module) == 0
    assert hooks(original) > 0
    assert torch.allclose(module(pixels(2, 32)).sum(1), torch.ones(2))


def test_a_foreign_graph_is_refused(tmp_path, kd):
    """It lacks class names and preprocessing: exit 3, for both formats, and for what is no graph at all."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Flatten(), (torch.zeros(2, 3, 4, 4),)), buffer)
    (tmp_path / "x.pt2").write_bytes(buffer.getvalue())
    result = kd("predict", "x.pt2", "x.png", "--trust")
    assert result.code == 3
    assert "not made by kd export" in result.error
    (tmp_path / "y.pt2").write_bytes(b"PK\x03\x04 nonsense")
    assert kd("predict", "y.pt2", "x.png", "--trust").code == 3
    if "onnxruntime" in sys.modules or pytest.importorskip("onnxruntime"):
        (tmp_path / "z.onnx").write_bytes(b"\x08\x0anonsense")
        assert kd("predict", "z.onnx", "x.png").code == 3
