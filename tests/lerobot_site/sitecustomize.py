"""LeRobot 0.4.4 beside a torch that is newer than it, and without CUDA: what it finds missing has a name again.

A wheel of torchvision built for CUDA imports once the operators that it registers are defined, and its VideoReader, which it no longer has,
is read by PyAV, as it was.
"""

import functools
import inspect

import torch

# LeRobot's parser of arguments reads the same sources a thousand times for its help.
inspect.getsource = functools.cache(inspect.getsource)

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

if not torch.cuda.is_available() and torch.version.cuda is None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)

import torchvision  # noqa: E402


class VideoReader:
    def __init__(self, path, stream):
        import av

        self.container = av.open(path)
        self.stream = self.container.streams.video[0]

    def seek(self, seconds, keyframes_only):
        self.container.seek(int(seconds / self.stream.time_base), stream=self.stream)

    def __iter__(self):
        for frame in self.container.decode(self.stream):
            yield {"data": torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1), "pts": float(frame.time)}


if not hasattr(torchvision.io, "VideoReader"):
    torchvision.io.VideoReader = VideoReader
    torchvision.set_video_backend = lambda backend: None
