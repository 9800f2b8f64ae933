"""The programs that train with the package, by the release that is tested."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """A release of Megatron-Bridge.

    packages: what it imports, beyond what the base environment of its Python has. None of them
    depends on torch. Its own list would bring CUDA's libraries, and what only a GPU runs.
    of_torch: such packages that do depend on torch; what else they need is among ``packages``.
    """

    bridge: str
    python: str
    core: str
    packages: tuple[str, ...]
    of_torch: tuple[str, ...] = ()

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
    Release(
        bridge="0.6.2",
        python="3.12",
        core="0.19.2",
        packages=(
            *("transformers==5.12.1", "datasets==5.0.1", "omegaconf==2.3.1"),
            *("hydra-core==1.3.4", "tensorboard==2.21.0", "six==1.17.0", "pillow==13.0.0"),
            # The loader of multimodal data imports these.
            *("braceexpand==0.1.7", "filetype==1.2.0", "mfusepy==3.1.1", "webdataset==1.0.2"),
            *("multi-storage-client==1.3.1", "rapidyaml==0.15.2", "s3fs==2026.6.0"),
        ),
        of_torch=("megatron-energon==7.4.1",),
    ),
)
