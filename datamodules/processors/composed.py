"""Items to the inputs of a composed backbone: one interleaved sequence of tokens and places for media.

A text part becomes its token ids. A medium becomes views of one size (an image one, a page a grid of tiles, a video one a
frame, audio one a second), and in the sequence: BEGIN, `tokens_per_view` × SOFT for each view, END. These places are negative
ids, so that any tokenizer serves unchanged; the backbone fills them with learnt boundaries and the tower's tokens, in order.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.audio_utils import mel_filter_bank

from datamodules.media.audio import SAMPLE_RATE
from datamodules.processors.processor import Processor, ProcessorConfig
from datamodules.sample import MEDIA_KINDS

BEGIN, SOFT, END = range(3)


def place_id(kind: str, role: int) -> int:
    """The negative id of a medium's BEGIN, SOFT or END."""
    return -1 - (3 * MEDIA_KINDS.index(kind) + role)


class ComposedProcessor(Processor):
    """Media become views by kind: uint8 (V, 3, size, size), for audio float32 (V, 1, mels, frames)."""

    def __init__(self, config: ProcessorConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(config, tokenizer)
        self.mel_filters = torch.tensor(
            mel_filter_bank(
                num_frequency_bins=257,
                num_mel_filters=config.num_mels,
                min_frequency=20.0,
                max_frequency=SAMPLE_RATE / 2,
                sampling_rate=SAMPLE_RATE,
                mel_scale="slaney",
                norm=None,
            ),
            dtype=torch.float32,
        )
        self.window = torch.hann_window(512)

    def medium(self, kind: str, content: Any) -> tuple[list[int], dict[str, Tensor]]:
        """BEGIN, places for every view, END; and the views of that kind."""
        views = self.views(kind, content)
        soft = [place_id(kind, SOFT)] * (len(views) * self.config.tokens_per_view[kind])
        return [place_id(kind, BEGIN), *soft, place_id(kind, END)], {kind: views}

    def views(self, kind: str, content: Any) -> Tensor:
        """The views of one decoded medium: uint8 (V, 3, size, size), for audio float32 (V, 1, mels, frames)."""
        size = self.config.view_size
        if kind == "audio":
            return self._spectrograms(torch.from_numpy(content))
        if kind == "page":
            rows, columns = self.config.page_grid
            pages = [_resize(page, columns * size, rows * size) for page in content]
            tiled = np.stack(pages).reshape(len(pages), rows, size, columns, size, 3).swapaxes(2, 3)
            pictures = tiled.reshape(-1, size, size, 3)
        else:
            frames = content.frames if kind == "video" else [content]
            pictures = np.stack([_resize(picture, size, size) for picture in frames])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def _spectrograms(self, wave: Tensor) -> Tensor:
        """Log-mel spectrograms of successive spans: (log10 of the power + 2) / 4, so -1 in silence and about 1.5 at most."""
        config = self.config
        span = round(config.seconds_per_view * SAMPLE_RATE)
        num_views = -(-len(wave) // span)
        wave = torch.nn.functional.pad(wave, (0, num_views * span - len(wave)))
        hop = span // config.num_frames
        spectrum = torch.stft(
            wave.view(num_views, span),
            n_fft=512,
            hop_length=hop,
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.abs().square()[:, :, : config.num_frames]
        mel = torch.einsum("fm,vft->vmt", self.mel_filters, power)
        return ((mel.clamp(min=1e-6).log10() + 2.0) / 4.0)[:, None]

    def num_tokens(self, extents: np.ndarray) -> np.ndarray:
        """Lengths (P,) that items of some extents (P,) `EXTENT` will have as sequences, about."""
        config = self.config
        pictures = extents["pictures"] * config.tokens_per_view["image"]
        audio = np.ceil(extents["audio"] / config.seconds_per_view) * config.tokens_per_view["audio"]
        frames = np.minimum(np.ceil(extents["video"] * config.decode.frames_per_second), config.decode.max_frames)
        return self.num_text_tokens(extents) + pictures + audio + frames * config.tokens_per_view["video"]


def _resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0))
