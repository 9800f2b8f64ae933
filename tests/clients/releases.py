"""The programs that train with the package, by the release that is tested."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """A release of Megatron-Bridge.

    packages: what it imports, beyond what the base environment of its Python has. None of them
    depends on torch. Its own list would bring CUDA's libraries, and what only a GPU runs.
    """

    bridge: str
    python: str
    core: str
    packages: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"bridge-{self.bridge}"


RELEASES = (
    Release(
        bridge="0.3.1",
        python="3.11",
        core="0.16.1",
        packages=(
            *("transformers==4.57.6", "datasets==5.0.1", "omegaconf==2.3.1"),
            *("hydra-core==1.3.2", "tensorboard==2.21.0", "six==1.17.0", "pillow==13.0.0"),
        ),
    ),
)
