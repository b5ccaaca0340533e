"""Object detectors whose boxes can serve as regions: torchvision's Faster R-CNN, as an extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from foveate.errors import FoveateError, require
from foveate.picture.geometry import Box

Detector = Callable[[Image.Image], Sequence[Box]]
DETECTORS = ("faster_rcnn",)
REGIONS, LEAST_SCORE = 36, 0.2  # as many as LXMERT's detector gives; lower scores are noise


def load_detector(name: str, device: str = "cpu") -> Detector:
    """A detector by name; its weights are downloaded from torchvision's server at first use.

    Raises:
        FoveateError: an unknown name, torchvision missing.
    """
    if name not in DETECTORS:
        raise FoveateError(f"unknown detector {name!r}: choose one of {', '.join(DETECTORS)}")
    require("torchvision", "detector", f"detector {name}")
    import torch
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
    from torchvision.transforms.functional import to_tensor

    network = fasterrcnn_resnet50_fpn_v2(
        weights="DEFAULT", box_detections_per_img=REGIONS, box_score_thresh=LEAST_SCORE
    )
    network = network.to(device).eval()

    @torch.inference_mode()
    def detect(picture: Image.Image) -> list[Box]:
        (found,) = network([to_tensor(picture).to(device)])
        return [Box(*corners) for corners in found["boxes"].tolist()]

    return detect
