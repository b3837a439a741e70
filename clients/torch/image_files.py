"""A PyTorch data set of image files, which are decoded, cropped and scaled while training."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clients.data import Examples
from clients.settings import ParticipantSettings
from clients.tasks import imagefolder
from clients.trainer import derive_seed
from flwr_colearn.errors import whole_number


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images [3, size, size] of uint8 and their classes, each read from its file on access.

    Plain images are resized (shorter side 8/7 of `size`, as 256 is of 224) and cropped in the
    centre. Augmented images, as in the paper, are crops of 8 to 100 % of the area at an aspect
    ratio of 3/4 to 4/3, scaled, and mirrored with probability one half.

    Attributes
    ----------
    examples : Examples
        The paths and the classes.
    size : int
        The height and width in pixels.
    augment : bool
        Whether the images that `seeded` returns are augmented.
    seed : int, optional
        The seed of the augmentation; None for plain images.
    """

    examples: Examples
    size: int
    augment: bool = False
    seed: int | None = None

    def seeded(self, seed: int) -> Self:
        """Return the images of one training epoch, augmented if `augment` is set."""
        return replace(self, seed=seed) if self.augment else self

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.examples.inputs[index]) as file:
            image = file.convert("RGB")
        return self._tensor(image, index), int(self.examples.labels[index])

    def _tensor(self, image: Image.Image, index: int) -> Tensor:
        if self.seed is None:
            return _plain(self.size)(image)  # type: ignore[no-any-return]
        # A seed for each image, so that the augmentation does not depend on the loader process
        # that reads the image. The fork restores the generator, from which dropout draws too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, index))
            return _augmented(self.size)(image)  # type: ignore[no-any-return]


def image_files(examples: Examples, settings: ParticipantSettings) -> ImageFiles:
    """Return the examples of the task imagefolder in the size that the settings give.

    Raises
    ------
    ColearnError
        If the image size is negative.
    """
    whole_number("run config 'image-size'", settings.image_size, least=0)
    size = settings.image_size or imagefolder.IMAGE_SIZE
    return ImageFiles(examples, size, settings.augment)


def _plain(size: int) -> Any:
    # Here, since torchvision takes a second to import, and Flower starts a process a message.
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    return Compose([Resize(round(size * 8 / 7)), CenterCrop(size), PILToTensor()])


def _augmented(size: int) -> Any:
    from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

    return Compose([RandomResizedCrop(size), RandomHorizontalFlip(), PILToTensor()])
