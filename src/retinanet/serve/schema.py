"""Options of ``/v1/detect``, and schemas of the responses for the OpenAPI description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_UNSET: Any = None  # a default of type None would be documented as a nullable option


class DetectOptions(BaseModel):
    """Query parameters of ``/v1/detect``."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(_UNSET, description="Model name; the first model by default.")
    score_threshold: float = Field(_UNSET, ge=0, lt=1, description="Minimum score.")
    nms_threshold: float = Field(_UNSET, gt=0, le=1, description="IoU threshold for NMS.")
    class_agnostic: bool = Field(_UNSET, description="Class-agnostic NMS.")
    detections_per_image: int = Field(
        _UNSET, ge=1, le=10_000, description="Maximum number of detections per image."
    )

    def thresholds(self) -> dict[str, Any]:
        """Return the thresholds that were sent, by the detector's names."""
        sent = self.model_dump(exclude_unset=True, exclude={"model"})
        if "class_agnostic" in sent:
            sent["class_agnostic_nms"] = sent.pop("class_agnostic")
        return sent


class ErrorResponse(BaseModel):
    """Every response other than 200."""

    detail: str = Field(description="One line for the user.")


class Detection(BaseModel):
    """One detected object."""

    class_name: str = Field(alias="class")
    category_id: int = Field(description="Category id in the training data.")
    score: float = Field(ge=0, le=1)
    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the upright image as it was sent."
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


class DetectResponse(BaseModel):
    """Detections, in the order of the uploaded images."""

    model: str
    images: list[Image]
    failures: list[Failure]
    milliseconds: float = Field(ge=0, description="From headers to response, upload included.")


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
    thresholds: dict[str, float | int | bool | str | dict[str, float]] = Field(
        description="score_thresholds by class; score_threshold is that of all other classes."
    )
    network: str = Field(description="Backend, device and precision.")
    metrics: Metrics | None
    milliseconds: float | None = Field(description="Median network time per image.")


class Limits(BaseModel):
    """Limits of a request."""

    bytes: int
    pixels: int = Field(description="Per image.")
    seconds: float


class ModelsResponse(BaseModel):
    """All models and the limits."""

    models: list[Model]
    limits: Limits
    version: str


class Health(BaseModel):
    """State of the service."""

    status: str
