"""Which frames of a video training reads."""

from samlove.errors import RequestError


def trained_frames(frames: int, count: int) -> list[int]:
    """The numbers of `count` frames, evenly spaced over the `frames` of a video; the first one is 0.

    Raises RequestError if a video has fewer frames than that.
    """
    if count > frames:
        raise RequestError(
            f"sam2.yaml: train_frames: expected at most the {frames} frames of a video (frames in dataset.yaml), "
            f"found {count}"
        )
    return [k * frames // count for k in range(count)]
