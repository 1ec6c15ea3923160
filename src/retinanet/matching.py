"""Which anchor answers for which object (Lin et al. 2017, Sec. 4, "Anchors")."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from retinanet import triton_probe
from retinanet.structures import BACKGROUND, IGNORED, Targets, is_readable

_RUN = 8192  # neighbouring anchors that are ruled in or out together, on a CPU
_USUAL_IOU = 0.5  # what an object's best anchor usually reaches
_ALL_IMAGES_PAIRS = 2**19  # pairs worked on at a time elsewhere: 2 MB an intermediate


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    targets: Targets,
    *,
    foreground_iou: float = 0.5,
    background_iou: float = 0.4,
    low_quality_matches: bool = False,
) -> Tensor:
    """For each anchor the object it answers for, if any.

    An anchor takes the object that it overlaps most (the first, where several overlap it equally):
    from an IoU of `foreground_iou` on as its object; under `background_iou` it is background;
    in between it is ignored. An anchor that is not foreground and lies within an ignored region is
    ignored: within means that `foreground_iou` of the anchor's area is covered, as COCO's
    evaluation treats detections and crowds.

    Source: Lin et al. 2017, Sec. 4, "Anchors". Low-quality matches: Ren et al. 2015 (Faster R-CNN),
    Sec. 3.1.2; the RetinaNet paper does not mention them.

    The anchors-by-objects matrix of IoU is never whole: the memory needed does not grow with the
    number of objects.

    Args:
        anchors: (R, 4) pixels.
        targets: objects of B images; a row with label IGNORED is an ignored region, one with
            BACKGROUND is padding, and one whose box is empty or not finite matches nothing.
        low_quality_matches: let the best anchors of each object take what they overlap most even
            if that is under `foreground_iou`, unless nothing overlaps the object at all.

    Returns:
        (B, R) int64: 0..M-1 the place of the object in `targets`, or BACKGROUND, or IGNORED.

    Raises:
        ValueError: shapes do not fit, or not 0 < background_iou <= foreground_iou <= 1.

    Differs: torchvision, for an object that no anchor touches, counts all anchors as its best.
    """
    boxes, labels = targets.boxes, targets.labels
    _check_anchors(anchors)
    if boxes.dim() != 3 or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:2]:
        raise ValueError(
            "targets are boxes (B, M, 4) and labels (B, M), "
            f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if not 0 < background_iou <= foreground_iou <= 1:
        raise ValueError(
            "matching needs 0 < background_iou <= foreground_iou <= 1, "
            f"got {background_iou} and {foreground_iou}"
        )
    anchors = anchors.to(boxes.dtype)
    kinds = torch.where(_has_area(boxes), labels, BACKGROUND)
    way = _match_image_by_image
    if _triton_serves(anchors):
        from retinanet.matching_triton import match as way
    elif not is_readable(boxes):
        # Looking which pairs can meet would wait for the device: all are taken, without a look.
        way = _match_all_images
    return way(anchors, boxes, kinds, foreground_iou, background_iou, low_quality_matches)


def anchor_labels(matches: Tensor, labels: Tensor) -> Tensor:
    """The class that each anchor has to learn.

    Args:
        matches: (B, R) from :func:`match_anchors`.
        labels: (B, M) the objects' labels.

    Returns:
        (B, R) int64 class 0..K-1, BACKGROUND or IGNORED.

    Raises:
        ValueError: the two are not of the same batch.
    """
    if matches.dim() != 2 or labels.dim() != 2 or len(matches) != len(labels):
        raise ValueError(
            "matches are (B, R) and labels (B, M), "
            f"got {tuple(matches.shape)} and {tuple(labels.shape)}"
        )
    if labels.shape[1] == 0:
        return matches.clone()
    return torch.where(matches >= 0, labels.gather(1, matches.clamp(min=0)), matches)


@torch.no_grad()
def anchor_coverage(anchors: Tensor, boxes: Tensor) -> Tensor:
    """How well the anchors can reach each object: its best IoU with any of them.

    Args:
        anchors: (R, 4) pixels.
        boxes: (M, 4) pixels of the same image.

    Returns:
        (M,) in [0, 1], float32 or wider; memory as for :func:`match_anchors`.

    Raises:
        ValueError: a shape does not fit.
    """
    _check_anchors(anchors)
    if boxes.dim() != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes are (M, 4), got {tuple(boxes.shape)}")
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    best = torch.zeros(len(boxes), dtype=boxes.dtype, device=boxes.device)
    usable = _has_area(boxes).nonzero().flatten()
    if len(usable):
        best[usable] = _best_anchors(_Runs(anchors.to(boxes.dtype)), boxes[usable])
    return best


def _match_image_by_image(
    anchors: Tensor,
    boxes: Tensor,
    kinds: Tensor,
    foreground_iou: float,
    background_iou: float,
    low_quality_matches: bool,
) -> Tensor:
    """:func:`match_anchors` on a CPU, where most pairs need no look at all: the definition."""
    matches = kinds.new_full((len(boxes), len(anchors)), BACKGROUND)
    runs = _Runs(anchors)
    for match, kind, of_image in zip(matches, kinds, boxes, strict=True):
        objects = (kind >= 0).nonzero().flatten()
        if len(objects):
            found = of_image[objects]
            for rows, place, best in _best_objects(runs, found, background_iou):
                match[rows] = torch.where(best < foreground_iou, IGNORED, objects[place])
            if low_quality_matches:
                chosen = _best_of_any(runs, found)
                for rows, place, _ in _best_objects(_Runs(anchors[chosen]), found, 0.0):
                    match[chosen[rows]] = objects[place]
        regions = (kind == IGNORED).nonzero().flatten()
        if len(regions):
            inside = _lies_within(runs, of_image[regions], foreground_iou)
            match.masked_fill_(inside & (match < 0), IGNORED)
    return matches


def _match_all_images(
    anchors: Tensor,
    boxes: Tensor,
    kinds: Tensor,
    foreground_iou: float,
    background_iou: float,
    low_quality_matches: bool,
) -> Tensor:
    """:func:`match_anchors` without a look at any value, for devices that would have to wait."""
    images, most = kinds.shape
    # Rows that count for nothing must not spoil a maximum with NaN.
    boxes = boxes.masked_fill((kinds == BACKGROUND)[..., None], 0)
    run = max(1, min(len(anchors), _ALL_IMAGES_PAIRS // max(1, images)))
    tile = max(1, _ALL_IMAGES_PAIRS // max(1, images * run))

    def pairs(rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some objects (m), their IoU with the anchors, and the share of the anchors that they
        cover, both (B, m, r); 0 where the pair is not one of the kind.
        """
        some = anchors[rows]
        anchor_area = _area(some)
        for first in range(0, most, tile):
            columns = slice(first, min(first + tile, most))
            chunk, kind = boxes[:, columns, None], kinds[:, columns, None]
            corner = torch.minimum(some[:, 2:], chunk[..., 2:])
            sides = corner.sub_(torch.maximum(some[:, :2], chunk[..., :2])).clamp(min=0)
            overlap = sides[..., 0] * sides[..., 1]
            iou = overlap / (anchor_area + _area(chunk) - overlap)
            covered = overlap.div_(anchor_area)
            yield (
                columns,
                iou.masked_fill_(kind < 0, 0),
                covered.masked_fill_(kind != IGNORED, 0),
            )

    starts = range(0, len(anchors), run)
    every_run = [slice(start, min(start + run, len(anchors))) for start in starts]
    highest = boxes.new_zeros(images, most)
    if low_quality_matches:
        for rows in every_run:
            for columns, iou, _ in pairs(rows):
                highest[:, columns] = torch.maximum(highest[:, columns], iou.amax(dim=2))
    matches = kinds.new_full((images, len(anchors)), BACKGROUND)
    for rows in every_run:
        best = boxes.new_zeros(images, rows.stop - rows.start)
        place = torch.zeros_like(best, dtype=torch.int64)
        chosen = torch.zeros_like(best, dtype=torch.bool)
        inside = torch.zeros_like(best, dtype=torch.bool)
        for columns, iou, covered in pairs(rows):
            tile_best, tile_place = iou.max(dim=1)
            better = tile_best > best
            best = torch.where(better, tile_best, best)
            place = torch.where(better, tile_place + columns.start, place)
            inside |= (covered >= foreground_iou).any(dim=1)
            if low_quality_matches:
                chosen |= ((iou == highest[:, columns, None]) & (iou > 0)).any(dim=1)
        match = torch.where(best < foreground_iou, IGNORED, place)
        match = torch.where(best < background_iou, BACKGROUND, match)
        match = torch.where(chosen, place, match)
        matches[:, rows] = torch.where(inside & (match < 0), IGNORED, match)
    return matches


def _triton_serves(anchors: Tensor) -> bool:
    on_gpu = anchors.device.type == "cuda" and anchors.dtype == torch.float32
    return on_gpu and not torch.compiler.is_compiling() and triton_probe.usable(anchors.device)


class _Runs:
    """Anchors in runs of neighbours, with what bounds each run."""

    def __init__(self, anchors: Tensor) -> None:
        count = len(anchors)
        self.count = count
        self.device = anchors.device
        values = anchors.new_empty(5, count)
        values[:4] = anchors.T
        x1, y1, x2, y2, area = values
        torch.mul(x2 - x1, y2 - y1, out=area)
        self.sides, self.areas = values[:4], area
        self.prunes = _prunes(anchors)
        length = _RUN if self.prunes else max(count, 1)
        self.slices = [slice(i, min(i + length, count)) for i in range(0, count, length)]
        if self.prunes and count:
            whole = count // length * length
            parts = [values[:, :whole].view(5, -1, length), values[:, None, whole:]]
            parts = [one for one in parts if one.numel()]
            self.low = torch.cat([one.amin(dim=2) for one in parts], dim=1)
            self.high = torch.cat([one.amax(dim=2) for one in parts], dim=1)

    def near(self, boxes: Tensor, least_iou: float | Tensor, over_anchor: bool) -> list[Tensor]:
        """For each run the places (in rising order) of the boxes that may meet it.

        On a CPU, boxes that cannot reach `least_iou` are left out: neighbouring anchors are of
        like size and place, so most boxes are ruled out for a whole run by place and area.
        """
        everything = torch.arange(len(boxes), device=self.device)
        if not self.prunes:
            return [everything] * len(self.slices)
        if not self.slices:
            return []
        x1, y1, x2, y2 = boxes.T
        low, high = self.low[..., None], self.high[..., None]
        near = (x1 < high[2]) & (y1 < high[3]) & (x2 > low[0]) & (y2 > low[1])
        if not over_anchor:
            # IoU is at most the smaller area over the larger; 1% of slack for rounding.
            areas, slack = _area(boxes), 0.99 * least_iou
            near &= (areas >= slack * low[4]) & (slack * areas <= high[4])
        _, columns = near.nonzero(as_tuple=True)
        return list(torch.split(columns, near.sum(dim=1).tolist()))


def _best_objects(
    runs: _Runs, boxes: Tensor, least_iou: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The anchors that overlap a box by `least_iou`, and the box that each overlaps most.

    Yields:
        rows (n,) of the anchors, places (n,) of the boxes, and their IoU (n,). A row that comes
        again overlaps a later box still more.
    """
    for run, tiles in _iou_tiles(runs, boxes, least_iou):
        best: Tensor | None = None
        for columns, iou in tiles:
            highest = iou.amax(dim=0)
            hit = highest >= least_iou
            # Tiles come in the order of the boxes: a later one must be better, not only as good.
            hit = (hit if best is None else hit & (highest > best)).nonzero().flatten()
            if len(hit):
                values, places = iou[:, hit].max(dim=0)
                yield hit + run.start, columns[places], values
            best = highest if best is None else torch.maximum(best, highest)


def _best_anchors(runs: _Runs, boxes: Tensor) -> Tensor:
    """(M,) the best IoU of each box with any anchor."""
    best = torch.zeros(len(boxes), dtype=boxes.dtype, device=boxes.device)
    # Nearly every box has an anchor of about its size; the others are looked for among all.
    for least_iou in (_USUAL_IOU, 0.0) if runs.prunes else (0.0,):
        rest = (best < _USUAL_IOU + 0.01).nonzero().flatten()
        some = best[rest]
        for _, tiles in _iou_tiles(runs, boxes[rest], least_iou):
            for columns, iou in tiles:
                some[columns] = torch.maximum(some[columns], iou.amax(dim=1))
        best[rest] = some
    return best


def _best_of_any(runs: _Runs, boxes: Tensor) -> Tensor:
    """(n,) the anchors, in rising order, such that no other overlaps some box more."""
    highest = _best_anchors(runs, boxes)
    chosen = torch.zeros(runs.count, dtype=torch.bool, device=runs.device)
    for run, tiles in _iou_tiles(runs, boxes, highest):
        for columns, iou in tiles:
            here = ((iou.amax(dim=1) == highest[columns]) & (highest[columns] > 0)).nonzero()
            for place in here.flatten():
                chosen[run] |= iou[place] == highest[columns[place]]
    return chosen.nonzero().flatten()


def _lies_within(runs: _Runs, regions: Tensor, share: float) -> Tensor:
    """(R,) whether one of the regions covers at least `share` of the anchor's area."""
    result = torch.zeros(runs.count, dtype=torch.bool, device=runs.device)
    for run, tiles in _iou_tiles(runs, regions, 0.0, over_anchor=True):
        for _, covered in tiles:
            result[run] |= (covered >= share).any(dim=0)
    return result


def _iou_tiles(
    runs: _Runs, boxes: Tensor, least_iou: float | Tensor, *, over_anchor: bool = False
) -> Iterator[tuple[slice, Iterator[tuple[Tensor, Tensor]]]]:
    """The IoU of all boxes with all anchors in tiles that stay in the processor's cache.

    Pairs that cannot reach `least_iou`, one number or one a box, may be left out.

    Yields:
        a run of the anchors (r), and its tiles: the places of some boxes (m,) in rising order, and
        (m, r) their IoU (or, with `over_anchor`, the share of the anchor's area that they cover).
    """
    areas = _area(boxes)

    def tiles(run: slice, near: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        x1, y1, x2, y2 = runs.sides[:, run]
        anchor_area = runs.areas[run]
        tile = 64 if runs.prunes else max(1, 2**22 // len(anchor_area))
        for columns in torch.split(near, tile):
            left, top, right, bottom = boxes[columns].T[:, :, None]
            overlap = (torch.minimum(x2, right).sub_(torch.maximum(x1, left))).clamp_(min=0)
            height = (torch.minimum(y2, bottom).sub_(torch.maximum(y1, top))).clamp_(min=0)
            overlap.mul_(height)
            if over_anchor:
                yield columns, overlap.div_(anchor_area)
            else:
                union = torch.add(anchor_area, areas[columns, None], out=height).sub_(overlap)
                yield columns, overlap.div_(union)

    for run, near in zip(runs.slices, runs.near(boxes, least_iou, over_anchor), strict=True):
        if len(near):
            yield run, tiles(run, near)


def _prunes(anchors: Tensor) -> bool:
    """Whether to look which pairs can meet at all: a GPU would have to wait for the answer."""
    return anchors.device.type == "cpu"


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _has_area(boxes: Tensor) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides > 0).all(dim=-1) & boxes.isfinite().all(dim=-1)


def _check_anchors(anchors: Tensor) -> None:
    if anchors.dim() != 2 or anchors.shape[-1] != 4:
        raise ValueError(f"anchors are (R, 4), got {tuple(anchors.shape)}")
