"""How the devices are arranged."""

from pydantic import PositiveInt

from qwq_jax.config.frozen import Frozen


class MeshConfig(Frozen):
    """Sizes of the mesh axes; their product is the number of devices used.

    Attributes:
        data: Replicas of the model, each with its own part of the batch.
        fsdp: Devices that share one copy of the parameters and the optimizer state; they split the batch as well.
        context: Devices that split the tokens of each row: for training on rows too long for the others to hold.
        tensor: Devices that split heads, feed-forward and vocabulary of each layer.
    """

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    context: PositiveInt = 1
    tensor: PositiveInt = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.context * self.tensor

    def check_row(self, name: str, tokens: int) -> None:
        """Raises a ValueError if `context` devices cannot share a row of so many tokens, which `name` decides."""
        if self.context > 1 and tokens % (2 * self.context):
            raise ValueError(
                f"{name} {tokens} does not divide by {2 * self.context}: mesh.context {self.context} deals each device "
                "two pieces of a row"
            )

    def share_of_process(self, processes: int, local_devices: int) -> "MeshConfig | None":
        """The mesh of one process, if each of several can hold replicas of the model of its own; None if not.

        Example:
            Four hosts of 8 chips and ``data=8, tensor=4``: each holds ``data=2, tensor=4``. With ``data=2, tensor=16``
            a replica needs the chips of two hosts.
        """
        if self.data % processes or local_devices % (self.size // self.data):
            return None
        return self.model_copy(update={"data": self.data // processes})
