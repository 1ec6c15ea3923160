"""Schemas of the responses, for the OpenAPI description only: the service builds JSON itself."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ErrorResponse(BaseModel):
    """Every response other than 200."""

    detail: str = Field(description="One line for the user.")


class Detection(BaseModel):
    """One detected object."""

    class_name: str = Field(alias="class")
    category_id: int = Field(description="Category id in the training data.")
    score: float = Field(ge=0, le=1)
    box: list[float] = Field(
        min_length=4,
        max_length=4,
        description="x1, y1, x2, y2 in pixels of the upright image as it was sent.",
    )


class Image(BaseModel):
    """Detections in one image, by decreasing score."""

    file: str = Field(description="File name that was sent with the image.")
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    detections: list[Detection]


class Failure(BaseModel):
    """An image that could not be processed."""

    file: str
    reason: str


class Milliseconds(BaseModel):
    """Time spent on a request."""

    total: float = Field(ge=0, description="From headers to response, upload included.")
    queue: float = Field(ge=0, description="Longest wait of one of its images for the network.")
    network: float = Field(ge=0, description="Sum of its images' shares of the network's time.")


class DetectResponse(BaseModel):
    """Detections, in the order of the uploaded images."""

    model: str
    images: list[Image]
    failures: list[Failure]
    milliseconds: Milliseconds


class Metrics(BaseModel):
    """Measured accuracy of a model."""

    AP: float | None
    AP50: float | None
    data: str | None
    split: str | None


class Model(BaseModel):
    """One model."""

    name: str
    default: bool = Field(description="Whether requests without a model name use it.")
    classes: list[str]
    category_ids: list[int]
    image_size: int = Field(description="Shorter side of the network's input in pixels.")
    max_size: int = Field(description="Maximum longer side of the network's input in pixels.")
    thresholds: dict[str, float | int | bool]
    network: str = Field(description="Backend, device and precision.")
    metrics: Metrics | None
    milliseconds: float | None = Field(
        description="Median network time per image, over recent images."
    )


class Limits(BaseModel):
    """Limits of a request."""

    bytes: int
    pixels: int = Field(description="Per image.")
    images: int
    seconds: float


class ModelsResponse(BaseModel):
    """All models and the limits."""

    models: list[Model]
    limits: Limits
    version: str


class Health(BaseModel):
    """State of the service."""

    status: str
