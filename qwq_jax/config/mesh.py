"""How the devices are arranged."""

from pydantic import PositiveInt

from qwq_jax.config.frozen import Frozen


class MeshConfig(Frozen):
    """Sizes of the three mesh axes; their product is the number of devices used.

    Attributes:
        data: Replicas of the model, each with its own part of the batch.
        fsdp: Devices that share one copy of the parameters and the optimizer state; they split the batch as well.
        tensor: Devices that split heads, feed-forward and vocabulary of each layer.
    """

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.tensor
