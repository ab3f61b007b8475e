"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        calibration: tokens of each passage that sketches begin with.
        length: N of passages, those that train sketches among them.
        num_samples: K, of the table of perplexities.
        passages: of each kind of text.
        rival_passages: of these, how many the rivals and other seeds read too.
        seeds: further ones of sampling.
        long_length: N of long passages, of times and of the text that is written on.
        long_samples: K, with long passages.
        haystacks: texts in which facts are planted, each of ``length`` tokens; K is a sixteenth of
            that, as it is for the times.
        repeats: of prefills of ``length`` tokens and of a token that is decoded.
        contexts: tokens before a token that is decoded.
        written: tokens that the model goes on with.
    """

    calibration: int = 2048
    length: int = 4096
    num_samples: tuple[int, ...] = (64, 128, 256, 512)
    passages: int = 2
    rival_passages: int = 1
    seeds: tuple[int, ...] = (1,)
    long_length: int = 8192
    long_samples: tuple[int, ...] = (256, 512)
    haystacks: int = 4
    repeats: int = 3
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)
    written: int = 48


STANDARD = Settings()
# To see that everything runs, and roughly how it comes out.
QUICK = Settings(
    calibration=512,
    length=1024,
    num_samples=(64, 128),
    passages=1,
    seeds=(1,),
    long_length=2048,
    long_samples=(128,),
    haystacks=1,
    repeats=2,
    contexts=(1024, 2048),
    written=24,
)
