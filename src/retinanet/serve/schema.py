"""The answers' shapes, for the OpenAPI description alone: what is sent is built by hand."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Problem(BaseModel):
    """Every answer that is not what was asked for."""

    detail: str = Field(description="One line for a person.")


class Detection(BaseModel):
    """One object."""

    class_name: str = Field(alias="class")
    category_id: int = Field(description="The class's id in the data that the model learned from.")
    score: float = Field(ge=0, le=1)
    box: list[float] = Field(
        min_length=4,
        max_length=4,
        description="x1, y1, x2, y2 in pixels of the upright image as it was sent.",
    )


class Image(BaseModel):
    """What is in one image, best first."""

    file: str = Field(description="The name that was sent with it.")
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    detections: list[Detection]


class Failed(BaseModel):
    """An image that could not be searched."""

    file: str
    reason: str


class Milliseconds(BaseModel):
    """Where a request's time went."""

    total: float = Field(ge=0, description="From its headers to its answer, the upload included.")
    queue: float = Field(ge=0, description="The longest that an image waited for the network.")
    network: float = Field(ge=0, description="Its images' shares of the network's time.")


class Answer(BaseModel):
    """What was found, in the order of the images sent."""

    model: str
    images: list[Image]
    failures: list[Failed]
    milliseconds: Milliseconds


class Judged(BaseModel):
    """How good a model is, by its run folder."""

    AP: float | None
    AP50: float | None
    data: str | None
    split: str | None


class Model(BaseModel):
    """One model."""

    name: str
    default: bool = Field(description="Whether it answers where none is named.")
    classes: list[str]
    category_ids: list[int]
    image_size: int = Field(description="Pixels of an image's shorter side at the network.")
    max_size: int = Field(description="Pixels of its longer side at most.")
    thresholds: dict[str, float | int | bool]
    network: str = Field(description="What runs it, and in which precision.")
    metrics: Judged | None
    milliseconds: float | None = Field(
        description="Median time of the network for one of the last images."
    )


class Limits(BaseModel):
    """What a request may be."""

    bytes: int
    pixels: int = Field(description="Of one image.")
    images: int
    seconds: float


class Models(BaseModel):
    """What is served."""

    models: list[Model]
    limits: Limits
    version: str


class Health(BaseModel):
    """Whether the service is."""

    status: str
