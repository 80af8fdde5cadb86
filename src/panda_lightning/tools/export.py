"""``panda export --ckpt_path X -o detector.onnx``: a detector as one file that other programs run.

The file holds preprocessing, network, bank, search, score and p-value, and map where the method has one. It is opened
as its users will, compared with the detector on pictures, and not left behind where it does not agree.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import ZipFile

import numpy as np
import torch
from jsonargparse import Namespace
from PIL import Image
from rich import get_console
from rich.progress import track
from torch import Tensor, nn

from panda_lightning.arguments import Bounds, OpenShare, Positive
from panda_lightning.command.parser import VERSION, OneSentenceParser
from panda_lightning.detectors.exported import Exported, Half, from_checkpoint, in_float32, snapshots
from panda_lightning.pictures.loose import Loose, pointed_at
from panda_lightning.pictures.pixels import Source
from panda_lightning.pictures.view import View
from panda_lightning.runtime.whole import new_folder, require_new
from panda_lightning.tools.certificate import (
    Array,
    Certificate,
    compare,
    compare_maps,
    generated,
    in_onnxruntime,
    in_torch,
    require_stored,
    scored,
)
from panda_lightning.types import PandaError

HELP = "Export a detector to one ONNX or torch.export file, and check that it gives the same scores."
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
LARGEST = 2**31 - 2**20  # bytes of an ONNX file in one piece
STEP = 16  # pictures that are compared at a time


def arguments(parser: OneSentenceParser) -> None:
    """Accept a checkpoint, and what to make of it."""
    add = parser.add_argument
    add("--ckpt_path", type=Path, required=True, help="The checkpoint of a detector.")
    add("-o", "--output", type=Path | None, default=None, help="The file; by default detector.onnx or detector.pt2.")
    add("--format", type=Literal["onnx", "torch"], default="onnx", help="onnx, or torch: a program of torch.export.")
    add("--verify", type=str | None, default=None, help="Folder of pictures to compare scores on, not from the bank.")
    add("--half", type=bool, default=False, help="Store weights and bank in float16: half the size, less exact.")
    add("--tolerance", type=Positive | None, default=None, help="For scores; by default 1e-4, or 5e-2 with --half.")
    add("--alpha", type=OpenShare | None, default=None, help="Level of the decision; by default .05 if possible.")
    add(
        "--input",
        type=Literal["any", "final"],
        default="any",
        help="any: pictures of any size; final: resized by the caller.",
    )
    add("--opset", type=Annotated[int, Bounds(18)] | None, default=None, help="ONNX opset; by default torch's.")


def run(config: Namespace) -> int:
    """Write the file, prove it and say what it is."""
    ending = ".onnx" if config.format == "onnx" else ".pt2"
    output = config.output or Path(f"detector{ending}")
    if output.suffix != ending:
        raise PandaError(
            f"--output={output} is not a name for --format {config.format}: choose a name that ends in {ending}."
        )
    require_new(output, _beside(output))
    if config.format == "onnx":
        _require_packages()
        _require_opset(config.opset)
    pictures = None if config.verify is None else pointed_at(config.verify)
    proof = export(
        config.ckpt_path, output, pictures, config.input == "any", config.alpha, config.half, config.opset,
        config.tolerance,
    )  # fmt: skip
    get_console().print(f"{output}: {proof.words()}", soft_wrap=True, markup=False, highlight=False)
    return 0


def export(
    checkpoint: Path,
    output: Path,
    pictures: Loose | None = None,
    resizes: bool = True,
    alpha: float | None = None,
    half: bool = False,
    opset: int | None = None,
    tolerance: float | None = None,
) -> Certificate:
    """Write a detector to a file, and compare them.

    Args:
        checkpoint: The detector's.
        output: The file: ONNX where its name ends in .onnx, else a program of torch.export.
        pictures: To compare with; None is for generated ones.
        resizes: Whether the file takes pictures of any size.
        alpha: Level of the decision.
        half: Keep weights and bank in float16.
        opset: Of ONNX.
        tolerance: Of scores, see Certificate; None is 1e-4, or 5e-2 with half.

    Raises:
        PandaError: If the detector cannot be exported, or the file does not agree with it; then it is not kept.
    """
    whole = Exported(checkpoint, resizes, alpha, half).eval()
    reference, sources = Reference(checkpoint, whole), generated() if pictures is None else pictures.sources
    if all(reference.opened(source) is None for source in sources):
        raise PandaError(f"none of the {len(sources)} pictures of --verify can be read: name others.")
    program = _traced(Half(whole).eval() if half else whole, whole)
    held = [*program.state_dict.values(), *program.constants.values()]
    size = sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
    outputs = ", ".join(whole.outputs)
    get_console().print(
        f"{output}: {whole.detector.method} as {size / 2**20:.1f} MiB, which gives {outputs}.",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    source = "generated" if pictures is None else f"{len(pictures)} given"
    proof = Certificate(source, tolerance or (HALF_TOLERANCE if half else TOLERANCE))
    with new_folder(output.parent) as folder:
        part = folder / output.name
        write(program, whole, part, size, opset)
        try:
            _certify(proof, part, whole, reference, sources)
        except PandaError as error:
            raise PandaError(
                f"{output} is not kept, because it does not give the detector's scores: {error}."
            ) from error
        _append(part, proof)
        require_new(output, _beside(output))  # once more: work takes time
        for path in (_beside(part), part):
            if path.exists():
                path.replace(output.parent / path.name)
    return proof


def write(program: Any, whole: Exported, path: Path, size: int, opset: int | None) -> None:
    """Write a traced program with what is to be known of it."""
    facts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in whole.facts().items()}
    facts = {"panda_lightning": VERSION.split()[0], **facts}
    if path.suffix == ".pt2":
        torch.export.save(program, path, extra_files={"facts.json": json.dumps(facts)})
        return
    with _quiet():
        made: Any = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=whole.outputs, opset_version=opset, verbose=False
        )
    for graph in (made.model.graph, *(function.graph for function in made.model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with paths of this machine
    made.model.metadata_props.update(facts)
    made.save(path, external_data=size > LARGEST)


def _traced(module: nn.Module, whole: Exported) -> Any:
    """The program of a module for any number of pictures, and where it resizes them, of any size."""
    dim, sides = torch.export.Dim, (64, 96) if whole.view is not None else whole.sides
    shapes: dict[int, Any] = {0: dim("batch", min=1, max=2**16)}
    if whole.view is not None:
        shapes |= {2: dim("height", min=1, max=2**16), 3: dim("width", min=1, max=2**16)}
    example = torch.zeros(2, 3, *sides, dtype=torch.uint8)
    with torch.no_grad(), _quiet():
        return torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=False)


def _certify(
    proof: Certificate, path: Path, whole: Exported, reference: "Reference", sources: Sequence[Source]
) -> None:
    """Score pictures by file and by detector, a few at a time, and compare."""
    proof.stored = require_stored(path, whole.held())
    run, proof.runtime = in_torch(path, whole.outputs) if path.suffix == ".pt2" else in_onnxruntime(path)
    parts: list[tuple[dict[str, Array], dict[str, Array]]] = []
    maps: list[Array] = []
    starts = range(0, len(sources), STEP)
    for start in track(starts, "Comparing", transient=True, disable=not get_console().is_terminal):
        pairs = [(source, reference.opened(source)) for source in sources[start : start + STEP]]
        seen = [source for source, picture in pairs if picture is not None]
        if seen:
            shown = [picture for _, picture in pairs if picture is not None]
            one, other = reference.scores(seen), scored(run, shown)
            if "map" in one:
                gaps = np.abs(one["map"] - other["map"]).max(axis=(1, 2))
                maps.append(np.stack([one.pop("map").max(axis=(1, 2)), gaps]))
                other.pop("map")
            parts.append((one, other))
    one, other = ({k: np.concatenate([part[i][k] for part in parts]) for k in parts[0][i]} for i in (0, 1))
    calibration = None if whole.calibration is None else whole.calibration.numpy()
    others = reference.detector.leave_one_out() if calibration is None else None
    compare(proof, one, other, calibration, whole.level, None if others is None else others.numpy())
    if maps:
        compare_maps(proof, *np.concatenate(maps, axis=1))


class Reference:
    """The detector itself, as its users have it, in float32."""

    def __init__(self, checkpoint: Path, whole: Exported) -> None:
        self.detector = in_float32(from_checkpoint(checkpoint))
        self.ses = None if whole.ses is None else snapshots(self.detector, checkpoint)
        self.view = View.of(self.detector.origin["view"])  # type: ignore[index]  # from_checkpoint has required it
        self.resizes = whole.view is not None

    def opened(self, source: Source) -> Array | None:
        """A picture (H, W, 3) as the file takes it, None where it cannot be read."""
        try:
            found = self.view.open(source)
            if self.resizes:
                return np.asarray(found.rgb(self.view.intensity))
            return self.view.fit(found).transpose(1, 2, 0)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    @torch.inference_mode()
    def scores(self, sources: list[Source]) -> dict[str, Array]:
        """Its scores (N,), and maps."""
        found = self.detector.score(sources)
        scores: dict[str, Array] = {"score": found.score}
        if found.maps is not None:
            scores["map"] = np.asarray(found.maps)
        if self.ses is not None:
            batch: Any = {"image": torch.from_numpy(np.stack([self.view(source) for source in sources]))}
            scores["ses_score"] = self.ses.scores(self.detector, batch).double().numpy()
        return scores


def _append(path: Path, proof: Certificate) -> None:
    """Add a certificate to a file whose other bytes stay as they were when it was compared."""
    text = json.dumps(asdict(proof))
    if path.suffix == ".pt2":
        with ZipFile(path, "a") as file:
            facts = next(name for name in file.namelist() if name.endswith("facts.json"))
            file.writestr(facts.replace("facts.json", "certificate.json"), text)
        return
    import onnx

    entry = onnx.StringStringEntryProto(key="certificate", value=text)
    with path.open("ab") as file:  # messages of protobuf that follow one another are one
        file.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def _beside(path: Path) -> Path:
    """Where an ONNX file of more than 2 GB keeps its weights."""
    return path.with_name(f"{path.name}.data")


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise PandaError(
            f"ONNX files are written and checked with {', '.join(missing)}, not installed here: `pip install "
            "'panda-lightning[export]'`, or choose --format torch."
        )


def _require_opset(opset: int | None) -> None:
    """Try a file that does nothing: onnxruntime does not say what it knows."""
    if opset is None:
        return
    import onnxruntime
    from onnx import helper

    value = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # it has errors of its own
        raise PandaError(
            f"--opset={opset} is too new for onnxruntime {onnxruntime.__version__}: choose a smaller one."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says of itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
