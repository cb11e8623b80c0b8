"""Video and sound from any file that FFmpeg reads, from folders of frames and from pictures; and videos written.

    with open_media(Path("clip.mp4")) as media:
        frames = media.frames_at(range(10))   # (10,H,W,3) uint8
        samples = media.sound(0, 10)          # (160000,) float32, 16 kHz, or None

Time 0 is the first frame. Frames of a folder and pictures are read as the pipeline reads them (samlove.data.dataset);
PyAV, with FFmpeg inside its wheel, reads all other files.
"""

from samlove.media.reading import Media, open_media
from samlove.media.writing import write_video

__all__ = ["Media", "open_media", "write_video"]
