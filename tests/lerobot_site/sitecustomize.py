"""A wheel of torchvision built for CUDA, beside a torch for the CPU, imports once the operators that it registers have a name."""

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

if not torch.cuda.is_available() and torch.version.cuda is None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
