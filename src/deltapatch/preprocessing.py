"""How an image becomes the tensor that a base expects: one small value, stored in every patch file."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1, le=16384)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocessing(BaseModel):
    """What a base does to a picture before its first layer; timm's names for the fields.

    Attributes:
        input_size: channels (1 or 3), height and width in pixels.
        mean: one value per channel, for pixels scaled to 0..1.
        std: one value per channel, for pixels scaled to 0..1.
        interpolation: how a picture is resized.
        crop_pct: the picture is resized to ``size / crop_pct`` before the centre crop.
        crop_mode: ``center`` keeps the aspect ratio and crops, ``squash`` does not keep it, ``border`` pads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    mean: tuple[FiniteFloat, ...] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
