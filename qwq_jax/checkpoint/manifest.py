"""The manifest: what a checkpoint holds and which bytes it came from."""

from pydantic import NonNegativeInt, PositiveInt, ValidationError

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat

FORMAT_VERSION = 1
QUANTIZED_VERSION = 2


class TensorRecord(Frozen):
    """One finished parameter.

    Attributes:
        path: Dotted parameter path.
        shape: Shape of the parameter.
        dtype: Dtype it is stored in, such as ``"bfloat16"``.
        source: Name of the Hugging Face tensor.
        source_dtype: Dtype of the Hugging Face tensor.
        sha256: Hash of the bytes of the Hugging Face tensor that was read, or that training would have written.
        stored_sha256: Hash of the bytes that ``export`` writes: the same tensor in the stored dtype. Of a quantised one
            and its scales: of what is stored, in the layout of the Hugging Face tensor.
    """

    path: str
    shape: tuple[NonNegativeInt, ...]
    dtype: str
    source: str
    source_dtype: str
    sha256: str
    stored_sha256: str


class Manifest(Frozen):
    """What ``manifest.json`` holds.

    Attributes:
        format_version: Version of the layout on disk: 1, or 2 for quantised weights.
        identity: Hash of all that decides the contents: the source's files, the settings.
        origin: Where the weights came from, for people.
        config: The architecture.
        files: Names of the files carried along verbatim (config.json, tokenizer, ...).
        tensors: One record a parameter, in Hugging Face's order.
        weights: How the projections are quantised, if they are.
    """

    format_version: PositiveInt = FORMAT_VERSION
    identity: str
    origin: str
    config: ModelConfig
    files: tuple[str, ...]
    tensors: tuple[TensorRecord, ...]
    weights: WeightFormat | None = None

    def to_json(self) -> bytes:
        """The contents of ``manifest.json``; equal manifests give equal bytes."""
        absent = {"weights"} if self.weights is None else set()  # which earlier versions of the program refuse
        return (self.model_dump_json(indent=1, exclude=absent) + "\n").encode()


def read_manifest(data: bytes, where: str) -> Manifest:
    """Parses ``manifest.json``.

    Raises:
        ValueError: It is damaged, or of a version that this program does not know.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{where} is not a manifest of this program: {field}: {first['msg']}") from None
    expected = FORMAT_VERSION if manifest.weights is None else QUANTIZED_VERSION
    if manifest.format_version != expected:
        raise ValueError(f"{where} has format version {manifest.format_version}, this program reads {expected}")
    return manifest
