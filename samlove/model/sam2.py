"""The light SAM 2: SAM 2 without its image encoder, run on precomputed image embeddings and prompted by [seg].

It uses the `sam2` package's own classes (SAM 2: Ravi et al., 2024); the prompt follows section 3.2 of the paper.
Letters: B objects, T frames, K prompt tokens, C channels, h x w the grid of the image embedding (stride 16).
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from samlove.errors import RequestError
from samlove.model.sam2_build import instantiate_sam2, load_sam2_weights

CachePoint = Literal["post_conv", "pre_conv"]
# The levels of the image embeddings, finest first as in SAM 2: strides 4, 8 and 16.
LEVELS = ("sam2_high_res_0", "sam2_high_res_1", "sam2_image_embed")


class Points(NamedTuple):
    """Clicks on one frame. coords: (B, P, 2) float, (x, y) as fractions of the frame's width and height, 0..1.
    labels: (B, P) int: 1 object, 0 background, 2 and 3 box corners, -1 padding."""

    coords: Tensor
    labels: Tensor


class FirstFrame(NamedTuple):
    """SAM 2's answer to a prompt, on the prompted frame, float32. M is 1 or, with the best of three masks, 3."""

    masks: Tensor  # (B, M, 4h, 4w) raw logits
    object_score: Tensor  # (B,) raw logits
    iou: Tensor  # (B, M) the IoU that SAM 2 expects of each mask, 0..1

    @property
    def best(self) -> Tensor:
        """The mask with the highest expected IoU: (B, 4h, 4w)."""
        return self.masks[torch.arange(len(self.masks), device=self.masks.device), self.iou.argmax(1)]


class Seen(NamedTuple):
    """SAM 2's answer on one frame of a video, float32 unless autocast is on."""

    masks: Tensor  # (B, 4h, 4w) raw logits, all -1024 if SAM 2 finds the object absent
    object_score: Tensor  # (B,) raw logits


class LightSam2(SAM2Base):
    """Prompt encoder, mask decoder and memory of SAM 2. Parameters are named as in the official checkpoints.

    A prompt token yields SAM 2's single mask, not the best of three. The three masks are for ambiguous prompts such as
    a single click, whereas [seg] names one object; choosing among them would depend on an IoU head that the paper's
    loss does not train. `best_of_three` chooses among them nevertheless, and then the IoU head is trained. Training
    (`first_frame`) and tracking (`track`) answer a token in the same way.

    The module always stays in evaluation mode. Training mode would only change the dropout of the memory attention,
    which is frozen, and the object score, which tracking needs.
    """

    def __init__(self, cache_point: CachePoint = "post_conv", **parts: Any) -> None:
        """parts: the arguments of SAM2Base. Use `build` or `load`, which read them from a configuration."""
        super().__init__(**parts)
        if not self.use_high_res_features_in_sam:
            raise RequestError("SAM 2 configuration: expected use_high_res_features_in_sam: true, found false")
        if not (self.directly_add_no_mem_embed and self.sam_mask_decoder.pred_obj_scores):
            raise RequestError(
                "SAM 2 configuration: expected directly_add_no_mem_embed: true and pred_obj_scores: true, found false"
            )
        self.cache_point = cache_point
        self.best_of_three = False
        self._positions: Tensor | None = None
        if cache_point == "post_conv":  # the stored embeddings are taken after these
            del self.sam_mask_decoder.conv_s0, self.sam_mask_decoder.conv_s1

    @classmethod
    def build(cls, config: str, cache_point: CachePoint = "post_conv") -> "LightSam2":
        """A light SAM 2 with random weights; `config` as in `samlove.config.read_sam2_config`."""
        overrides = {"_target_": f"{cls.__module__}.{cls.__qualname__}", "cache_point": cache_point}
        model = instantiate_sam2(config, image_encoder=False, **overrides)
        assert isinstance(model, cls)
        return model

    @classmethod
    def load(cls, config: str, checkpoint: str, cache_point: CachePoint = "post_conv") -> "LightSam2":
        """A light SAM 2 with the weights of `checkpoint`, as in `samlove.model.sam2_build.load_sam2_weights`."""
        model = cls.build(config, cache_point)
        load_sam2_weights(model, checkpoint)
        return model

    @property
    def prompt_dim(self) -> int:
        """Channels of a prompt token."""
        return self.sam_prompt_embed_dim

    def train(self, mode: bool = True) -> "LightSam2":
        """Does nothing: the module stays in evaluation mode, see the class."""
        return super().train(False)

    def set_trainable(self, prompt_encoder: bool, mask_decoder: bool) -> None:
        """Make only these two trainable (section 3.2, Trainable Modules), and only the parts that `first_frame` uses.

        `first_frame` uses neither the heads of the other mask tokens nor the prompt encoder's clicks, boxes and masks,
        and with a single mask no IoU head, so they could not learn. Because they stay frozen, data-parallel training
        sees no parameter without a gradient.
        """
        encoder, decoder = self.sam_prompt_encoder, self.sam_mask_decoder
        self.requires_grad_(False)
        if prompt_encoder:
            encoder.not_a_point_embed.requires_grad_(True)
            encoder.no_mask_embed.requires_grad_(True)
        if mask_decoder:
            decoder.requires_grad_(True)
            decoder.iou_prediction_head.requires_grad_(self.best_of_three)
            for number, head in enumerate(decoder.output_hypernetworks_mlps):
                head.requires_grad_(number in self._answers)

    @property
    def _answers(self) -> range:
        """The numbers of the mask tokens that answer a prompt token."""
        return range(1, self.sam_mask_decoder.num_mask_tokens) if self.best_of_three else range(1)

    def first_frame(self, embeds: dict[str, Tensor], token: Tensor) -> FirstFrame:
        """The training path: segment one frame of each of B videos, the first that SAM 2 sees of it, with gradients.

        embeds: the precomputed embeddings of these frames, `sam2_image_embed` (B, C, h, w), `sam2_high_res_0`
            (B, C0, 4h, 4w), `sam2_high_res_1` (B, C1, 2h, 2w); other keys are ignored.
        token: (B, K, prompt_dim), each video's own, appended to the sparse prompt embeddings of "no point".
        If the object score is negative, SAM 2's tracking sets the whole mask to -1024, which would pass no gradient;
        this method does not.
        """
        fine, middle, image = self._on_device(embeds)
        return self._decode(*self._answer(image, token), fine, middle)

    @torch.no_grad()
    def object_scores(self, embeds: dict[str, Tensor], token: Tensor) -> Tensor:
        """The object score of `first_frame` on every frame by itself: raw logits (B, T), float32.

        embeds: as in `track`. token: (B, K, prompt_dim).
        """
        scores = []
        for frame in range(len(embeds[LEVELS[-1]])):
            image = embeds[LEVELS[-1]][frame : frame + 1].to(self.device, non_blocking=True).to(self.no_mem_embed.dtype)
            said, _ = self._answer(image.expand(len(token), -1, -1, -1), token)
            scores.append(self.sam_mask_decoder.pred_obj_score_head(said[:, 0])[:, 0].float())
        return torch.stack(scores, dim=1)

    def _answer(self, image: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The mask decoder's transformer for B frames and their tokens (B, K, prompt_dim), without memory.

        image (B, C, h, w). Returns the tokens of the object score, the IoU, each mask and the prompt, (B, n, C), and
        the image as tokens, (B, hw, C).
        """
        encoder, decoder = self.sam_prompt_encoder, self.sam_mask_decoder
        image = image + self.no_mem_embed.view(1, -1, 1, 1) + encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        no_point = encoder.not_a_point_embed.weight.expand(len(token), 2, -1)
        prompt = torch.cat([no_point, token], dim=1)
        own = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(token), -1, -1), prompt], dim=1)
        return decoder.transformer(image, self._dense_positions().expand_as(image), tokens)

    def _decode(self, said: Tensor, seen: Tensor, fine: Tensor, middle: Tensor) -> FirstFrame:
        """What SAM 2's mask decoder computes for the masks asked for, without what it computes for the others.

        said (B, n, C) and seen (B, hw, C) as from `_answer`; fine (B, C0, 4h, 4w); middle (B, C1, 2h, 2w).
        The upscaling runs on tokens, C channels last: a transposed convolution of kernel and stride 2 turns each token
        into 2x2 tokens, each by a matrix of its own. So only the masks, of one channel each, must be put in order.
        """
        decoder, B, (h, w) = self.sam_mask_decoder, len(said), (side // 4 for side in fine.shape[-2:])
        up1, norm, act1, up2, act2 = decoder.output_upscaling
        middle = middle.view(B, -1, h, 2, w, 2).permute(0, 2, 4, 3, 5, 1).flatten(1, 4)  # (B, hw*4, C1)
        fine = fine.view(B, -1, h, 2, 2, w, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1).flatten(1, 6)  # (B, hw*16, C0)
        x = F.layer_norm(_upscale(seen, up1) + middle, middle.shape[-1:], norm.weight, norm.bias, norm.eps)
        x = act2(_upscale(act1(x), up2) + fine)
        heads = [decoder.output_hypernetworks_mlps[number](said[:, 2 + number]) for number in self._answers]
        masks = torch.stack(heads, dim=1) @ x.transpose(1, 2)  # (B, M, hw*16)
        masks = masks.view(B, -1, h, w, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(B, -1, 4 * h, 4 * w)
        score = decoder.pred_obj_score_head(said[:, 0])[:, 0]
        if self.best_of_three:
            iou = decoder.iou_prediction_head(said[:, 1])[:, list(self._answers)]
        else:
            iou = score.new_ones(B, 1)
        return FirstFrame(masks.float(), score.float(), iou.float())

    def _dense_positions(self) -> Tensor:
        """The position encoding of the image embedding, (1, C, h, w): a constant, computed once."""
        if self._positions is None or self._positions.device != self.device:
            with torch.no_grad():
                self._positions = self.sam_prompt_encoder.get_dense_pe()
        return self._positions

    @torch.no_grad()
    def track(
        self,
        embeds: dict[str, Tensor],
        *,
        token: Tensor | None = None,
        points: Points | None = None,
        masks: Tensor | None = None,
        frame: int = 0,
    ) -> Tensor:
        """Segment B objects in all frames of one video, prompted on one frame by one kind of prompt.

        Tracks from the prompted frame to the last one, and then from it back to the first one. Follows, step by step,
        what `SAM2VideoPredictor` does for each object separately in `propagate_in_video` and then, with `reverse`, in
        a second call: the frames tracked forwards stay in memory. `tests/test_parity.py` compares the two.

        embeds: as in `first_frame`, with T frames in place of B; may be on another device: frames move one at a time.
        token: (B, K, prompt_dim). masks: (B, H, W), nonzero at the object; resized to SAM 2's input size if necessary.
        frame: the prompted one, 0 <= frame < T.
        Returns mask logits (B, T, 4h, 4w). All logits of a frame are -1024 if SAM 2 finds the object absent in it.
        """
        if sum(prompt is not None for prompt in (token, points, masks)) != 1:
            raise ValueError("track takes exactly one of token, points and masks")
        frames = len(embeds[LEVELS[-1]])
        batch = len(next(p for p in (token, masks, points and points.coords) if p is not None))
        track = Track(self, frames)
        seen = {frame: track.prompt(_row(embeds, frame), frame, batch, token, points, masks)}
        order = [*range(frame + 1, frames), *range(frame - 1, -1, -1)]
        for place, t in enumerate(order):
            way_back = [frame - 1] * (t > frame > 0)
            seen[t] = track.step(_row(embeds, t), t, order[place + 1 : place + 2] + way_back)
        return torch.stack([seen[t].masks for t in range(frames)], dim=1)  # (B, T, 4h, 4w)

    def _features(self, embeds: dict[str, Tensor], frame: int | None = None, batch: int | None = None) -> dict:
        """A frame's features in the form that SAM2Base's methods take, from the precomputed embeddings.

        With `frame`: that frame of one video, repeated for `batch` objects. Without it: all rows as they are. Position
        encodings are those of the last level, the only ones that SAM 2 reads.
        """
        rows = slice(None) if frame is None else slice(frame, frame + 1)
        levels = self._on_device({name: embeds[name][rows] for name in LEVELS})
        if batch is not None:
            levels = [level.expand(batch, -1, -1, -1) for level in levels]
        coarse = levels[-1]
        positions = self.image_encoder.neck.position_encoding(coarse[:1]).to(coarse.dtype).expand_as(coarse)
        return {
            "current_vision_feats": [level.flatten(2).permute(2, 0, 1) for level in levels],  # (hw, B, C) each
            "current_vision_pos_embeds": [positions.flatten(2).permute(2, 0, 1)],  # (hw, B, C)
            "feat_sizes": [(level.shape[-2], level.shape[-1]) for level in levels],
        }

    def _on_device(self, embeds: dict[str, Tensor]) -> list[Tensor]:
        """The three levels, finest first, on the model's device and in its dtype, after conv_s0 and conv_s1."""
        moved = (embeds[name].to(self.device, non_blocking=True) for name in LEVELS)
        levels = [level.to(self.no_mem_embed.dtype) for level in moved]  # a single `to` would widen before moving
        if self.cache_point == "pre_conv":
            levels[0] = self.sam_mask_decoder.conv_s0(levels[0])
            levels[1] = self.sam_mask_decoder.conv_s1(levels[1])
        return levels

    def _high_res(self, features: dict) -> list[Tensor]:
        """The two finer levels in the form that the mask decoder takes."""
        pairs = zip(features["current_vision_feats"][:-1], features["feat_sizes"][:-1], strict=True)
        return [feats.permute(1, 2, 0).unflatten(2, size) for feats, size in pairs]  # (B, C0, 4h, 4w), (B, C1, 2h, 2w)

    def _without_memory(self, features: dict) -> Tensor:
        """The image embedding of a frame without memory: SAM 2 adds no_mem_embed. (B, C, h, w)"""
        return self._prepare_memory_conditioned_features(
            frame_idx=0,
            is_init_cond_frame=True,
            current_vision_feats=features["current_vision_feats"][-1:],
            current_vision_pos_embeds=features["current_vision_pos_embeds"],
            feat_sizes=features["feat_sizes"][-1:],
            output_dict={},
            num_frames=1,
        )

    def _prompted(
        self,
        features: dict,
        frame: int,
        frames: int,
        token: Tensor | None,
        points: Points | None,
        masks: Tensor | None,
    ) -> dict:
        """Segment the prompted frame: `pred_masks` (B, 1, 4h, 4w), `object_score_logits` (B, 1), and the memory that
        all other frames attend to."""
        if token is not None:
            out = self._prompted_by_token(features, token)
        else:
            out = self.track_step(
                frame_idx=frame,
                is_init_cond_frame=True,
                **features,
                point_inputs=None if points is None else self._point_inputs(points),
                mask_inputs=None if masks is None else self._mask_inputs(masks),
                output_dict={},
                num_frames=frames,
                run_mem_encoder=False,
            )
        # The official predictor's preflight encodes this frame from its upsampled low-resolution mask. With a mask
        # prompt, that differs from the given mask.
        size = (self.image_size, self.image_size)
        high_res = F.interpolate(out["pred_masks"], size=size, mode="bilinear", align_corners=False)
        memory, positions = self._encode_new_memory(
            features["current_vision_feats"],
            features["feat_sizes"],
            high_res,
            out["object_score_logits"],
            is_mask_from_pts=True,
        )
        seen = {"pred_masks": out["pred_masks"], "object_score_logits": out["object_score_logits"]}
        return seen | self._stored(memory, positions, out["obj_ptr"])

    def _prompted_by_token(self, features: dict, token: Tensor) -> dict:
        """As `track_step` for a frame without point or mask, with the token appended to the sparse embeddings."""
        token = token.to(self.device)
        handle = self.sam_prompt_encoder.register_forward_hook(
            lambda module, inputs, embeddings: (torch.cat([embeddings[0], token], dim=1), embeddings[1])
        )
        try:
            *_, pred_masks, _, obj_ptr, object_score = self._forward_sam_heads(
                self._without_memory(features),
                high_res_features=self._high_res(features),
                multimask_output=self.best_of_three,
            )
        finally:
            handle.remove()
        return {"pred_masks": pred_masks, "obj_ptr": obj_ptr, "object_score_logits": object_score}

    def _point_inputs(self, points: Points) -> dict[str, Tensor]:
        coords = points.coords.to(self.device, torch.float32) * self.image_size
        return {"point_coords": coords, "point_labels": points.labels.to(self.device, torch.int32)}

    def _mask_inputs(self, masks: Tensor) -> Tensor:
        """Prepare masks as the official predictor's `add_new_mask`: (B, H, W) to 0/1 (B, 1, image_size, image_size)."""
        inputs = (masks[:, None] > 0).float().to(self.device)
        size = (self.image_size, self.image_size)
        if inputs.shape[-2:] == size:
            return inputs
        return (F.interpolate(inputs, size=size, mode="bilinear", align_corners=False, antialias=True) >= 0.5).float()

    def _stored(self, memory: Tensor, positions: list[Tensor], obj_ptr: Tensor) -> dict:
        """A frame's entry in the memory bank; in bfloat16, as in the official predictor."""
        return {"maskmem_features": memory.to(torch.bfloat16), "maskmem_pos_enc": positions, "obj_ptr": obj_ptr}

    def _forget(self, memories: dict[int, dict], upcoming: list[int]) -> None:
        """Drop memories that no upcoming frame can attend to. upcoming: the nearest such frames."""
        reach = 1 + max(self.num_maskmem - 2, 0) * self.memory_temporal_stride_for_eval  # in frames, for spatial memory
        for t in list(memories):
            distance = min(abs(t - frame) for frame in upcoming)
            if distance > max(reach, self.max_obj_ptrs_in_encoder - 1):
                del memories[t]
            elif distance > reach:
                memories[t]["maskmem_features"] = memories[t]["maskmem_pos_enc"] = None


class Track:
    """B objects that SAM 2 follows through one video, frame by frame; `LightSam2.track` is a loop over it.

    Holds the memory of the prompted frame and, of the others, only what a coming frame can attend to. So the number of
    frames does not matter.
    """

    def __init__(self, sam2: LightSam2, frames: int) -> None:
        """frames: of the video; SAM 2 measures the distance to an object pointer by it, if there are fewer than 16."""
        self._sam2, self._frames = sam2, frames
        self._memories: dict[int, dict] = {}

    @torch.no_grad()
    def prompt(
        self,
        embeds: dict[str, Tensor],
        frame: int,
        batch: int,
        token: Tensor | None = None,
        points: Points | None = None,
        masks: Tensor | None = None,
    ) -> Seen:
        """Segment the frame on which `batch` objects are prompted. embeds: of this frame, (1, ...) each."""
        sam2, self._frame, self._batch = self._sam2, frame, batch
        features = sam2._features(embeds, 0, batch)
        self._prompted = sam2._prompted(features, frame, self._frames, token, points, masks)
        return Seen(self._prompted.pop("pred_masks")[:, 0], self._prompted.pop("object_score_logits")[:, 0])

    @torch.no_grad()
    def step(self, embeds: dict[str, Tensor], frame: int, upcoming: list[int]) -> Seen:
        """Segment a frame; those before the prompted one in descending order.

        embeds: as in `prompt`. upcoming: the frame of the next step, and those at which tracking continues later in
        another direction; empty after the last one, whose memory nothing reads.
        """
        out = self._sam2.track_step(
            frame_idx=frame,
            is_init_cond_frame=False,
            **self._sam2._features(embeds, 0, self._batch),
            point_inputs=None,
            mask_inputs=None,
            output_dict={"cond_frame_outputs": {self._frame: self._prompted}, "non_cond_frame_outputs": self._memories},
            num_frames=self._frames,
            track_in_reverse=frame < self._frame,
            run_mem_encoder=bool(upcoming),
        )
        if upcoming:
            memory = self._sam2._stored(out["maskmem_features"], out["maskmem_pos_enc"], out["obj_ptr"])
            self._memories[frame] = memory
            self._sam2._forget(self._memories, upcoming)
        return Seen(out["pred_masks"][:, 0], out["object_score_logits"][:, 0])

    def select(self, rows: list[int]) -> "Track":
        """The same track of some of its objects."""
        part = Track(self._sam2, self._frames)
        part._frame, part._batch = self._frame, len(rows)
        part._prompted = _rows_of(self._prompted, rows)
        part._memories = {frame: _rows_of(memory, rows) for frame, memory in self._memories.items()}
        return part


def _row(embeds: dict[str, Tensor], frame: int) -> dict[str, Tensor]:
    return {name: embeds[name][frame : frame + 1] for name in LEVELS}


def _rows_of(memory: dict, rows: list[int]) -> dict:
    """Some objects' part of an entry of the memory bank."""
    return {
        name: value if value is None else [v[rows] for v in value] if isinstance(value, list) else value[rows]
        for name, value in memory.items()
    }


def _upscale(tokens: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """A transposed convolution of kernel and stride 2 on tokens: (B, n, C) -> (B, n*4, C'), 2x2 of a token in a row."""
    weight, bias = conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias  # (4*C', C)
    assert bias is not None
    return F.linear(tokens, weight, bias.repeat(4)).view(len(tokens), -1, conv.out_channels)
