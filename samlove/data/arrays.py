"""The arrays of an item in each feature store. A store from elsewhere may have others."""

from samlove.errors import SamloveError
from stores import FeatureStore

# Store -> array -> number of dimensions. N: frames, P: patches, L: text tokens, d: widths, C: channels.
DIMENSIONS = {
    "audio": {"audio": 2, "audio_valid": 1},  # (N, dA), (N,)
    "visual": {"visual": 3},  # (N, 1+P, dV)
    "text": {"text": 2, "text_mask": 1},  # (L, dT), (L,)
    "sam2": {"sam2_image_embed": 4, "sam2_high_res_0": 4, "sam2_high_res_1": 4},  # (N, C, h, w)
}


def check_arrays(name: str, store: FeatureStore) -> None:
    """Raise SamloveError unless the items of `store` have the arrays of the feature store `name`, and no others."""
    found = {array: len(shape) for array, shape in store.shapes.items()}
    if found != DIMENSIONS[name]:
        raise SamloveError(
            f"{store.path}: expected arrays with these numbers of dimensions: {DIMENSIONS[name]}, found {found}; "
            f"run: dvc repro -f -s {name}"
        )
