"""Settings of a run that only reads the model."""

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.mesh import MeshConfig


class InferenceConfig(Frozen):
    """What ``generate`` and ``chat`` can be told with ``--set``.

    Attributes:
        engine: Sizes and types of the engine.
        mesh: The device mesh.
    """

    engine: EngineConfig = EngineConfig()
    mesh: MeshConfig = MeshConfig()
