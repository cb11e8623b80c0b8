"""Table 1 of the SAM2-LOVE paper (CVPR 2025): results on Ref-AVS Bench."""

from typing import NamedTuple


class PaperRow(NamedTuple):
    """J, F, J&F in percent for seen, unseen and their mix; S of the null split if the paper gives it."""

    method: str
    seen: tuple[float, float, float]
    unseen: tuple[float, float, float]
    mix: tuple[float, float, float]
    null: float | None


TABLE_1 = (
    PaperRow("AVSBench", (21.2, 45.7, 33.5), (27.7, 50.9, 39.3), (24.5, 48.3, 36.4), None),
    PaperRow("AVSBench + text", (23.2, 51.1, 37.2), (32.4, 54.7, 43.5), (27.8, 52.9, 40.3), 0.208),
    PaperRow("AVSegFormer", (29.2, 42.3, 35.7), (32.7, 45.1, 38.9), (30.9, 43.7, 37.3), None),
    PaperRow("AVSegFormer + text", (33.5, 47.0, 40.2), (36.1, 50.1, 43.1), (34.8, 48.6, 41.7), 0.171),
    PaperRow("GAVS", (24.8, 45.5, 35.2), (27.8, 46.0, 36.9), (26.3, 45.7, 36.0), None),
    PaperRow("GAVS + text", (28.9, 49.8, 39.4), (29.8, 49.7, 39.8), (29.4, 49.8, 39.6), 0.190),
    PaperRow("ReferFormer", (27.4, 47.7, 37.5), (24.9, 50.4, 37.6), (26.2, 49.1, 37.6), None),
    PaperRow("ReferFormer + audio", (31.3, 50.1, 40.7), (30.4, 48.8, 39.6), (30.9, 49.5, 40.2), 0.176),
    PaperRow("R2VOS", (21.3, 30.9, 26.1), (23.9, 43.1, 33.5), (22.6, 37.0, 29.8), None),
    PaperRow("R2VOS + audio", (25.0, 41.0, 33.0), (27.9, 49.8, 38.9), (26.5, 45.4, 35.9), 0.183),
    PaperRow("EEMC", (34.2, 51.3, 42.8), (49.5, 64.8, 57.2), (41.9, 58.1, 50.0), 0.007),
    PaperRow("SAM2-LOVE", (43.5, 51.9, 47.7), (66.5, 72.3, 69.4), (55.0, 62.1, 58.5), 0.23),
)
