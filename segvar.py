"""Seg-VAR: everything in a picture, from the picture alone (Zheng et al., NeurIPS 2025; no code of theirs is public).

Segmentation becomes the generation of one picture. The masks of all instances are painted into a color map, in which
the color of an instance says where it is; the map and the classes become a "seglat", a picture of three channels, and
the seglat becomes discrete tokens, coarse to fine. A posterior over these tokens is learnt from the masks, a prior from
the picture, and the two are trained to agree. To segment, the prior writes tokens, and all masks are read from them:

    log p(masks | picture)  >=  E_q(z | masks) [log p(masks | z)]  -  KL(q(z | masks) || p(z | picture))

This part is the paper's Psi and its inverse, `color_map` and `instances`.
Legend: a the grid, H W a picture's height and width, N instances. Masks are bool (N, H, W).
"""

import numpy as np
import torch
import torch.nn.functional as F

# ---- Psi: masks to a picture in which color is place -----------------------------------------------------


def palette(grid):
    """The colors of the a * a cells in raster order, after black for the background: uint8 (1 + a * a, 3).

    They lie far apart and far from black: they are points of the cube's grid of m x m x m, (m - 1) x m x m or
    (m - 1) x (m - 1) x m levels whose three indices have an even sum (the densest packing of balls), m as small as can
    be. Where such a grid has more points than are needed, some in even steps are left out.
    Paper: the colors are not stated; we use these. The smallest distance is 81 of 255 for a = 8, 48 for a = 16.
    """
    needed = grid * grid + 1
    m = 3
    while m**3 < 2 * needed:
        m += 1
    levels = next(sides for sides in ((m - 1, m - 1, m), (m - 1, m, m), (m, m, m)) if np.prod(sides) >= 2 * needed)
    points = np.stack(np.meshgrid(*map(np.arange, levels), indexing="ij"), -1).reshape(-1, 3)
    points = points[points.sum(1) % 2 == 0]  # the first one is black
    chosen = points[np.arange(needed) * (len(points) - 1) // (needed - 1)]
    return np.round(chosen * 255 / (np.array(levels) - 1)).astype(np.uint8)


def color_map(masks, grid):
    """Psi: masks bool (N, H, W) -> uint8 (H, W, 3), each instance in the color of the cell that holds its center.

    The center is the mean of an instance's pixels. Where two centers fall into one cell, the larger instance keeps it
    and the other takes the nearest free cell. The order is by area, then by the first pixel, so that the map does not
    depend on the order of the masks. Paper: what happens to clashes is not stated; we use the above.
    Of overlapping masks the smaller is painted over the larger. Empty masks take no cell. Of more than a * a instances
    the smallest stay black. A crowd is many instances in one mask: leave it out.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or masks.dtype != bool or not masks.shape[1] * masks.shape[2] or grid < 1:
        raise ValueError(f"expected masks bool (N, H, W) and a grid of at least 1, got {masks.dtype} {masks.shape} and "
                         f"{grid}")
    size = np.array(masks.shape[1:])
    pixels = [np.argwhere(mask) for mask in masks]  # (n, 2) in raster order
    order = sorted((k for k, p in enumerate(pixels) if len(p)), key=lambda k: (-len(pixels[k]), pixels[k][0].tolist()))
    picture, colors = np.zeros((*size, 3), np.uint8), palette(grid)
    free = np.ones(grid * grid, bool)
    cells = np.stack(np.divmod(np.arange(grid * grid), grid), 1)  # (a * a, 2): row and column
    for k in order[: grid * grid]:
        n = len(pixels[k])
        # floor(center * a / size), the center being the mean of the pixel + 0.5; in integers, so that it is exact
        home = (2 * pixels[k].sum(0) + n) * grid // (2 * n * size)
        distance = ((cells - home) ** 2).sum(1)
        cell = np.where(free, distance, distance.max() + 1).argmin()  # of equally near ones the first
        free[cell] = False
        picture[masks[k]] = colors[1 + cell]
    return picture


def instances(picture, grid, size=None, least=1):
    """The inverse of `color_map`: uint8 (h, w, 3) -> bool (N, H, W), a mask for each cell whose color is there, in the
    raster order of the cells. Disjoint masks, at most a * a, come back exactly.

    Every pixel goes to the nearest color of the palette. A cell with fewer than `least` pixels is noise: they go to the
    nearest of the other colors. size: the (H, W) of the masks if the picture has another. Then the distances to the
    colors are resized, not the picture: a mixture of two colors is a third one, an instance that is not there. (Their
    squares would not do: the color whose mixed squares are least is again the mixture of the two.)
    """
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"expected a picture uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
    numbers, where = np.unique(picture @ np.array([1, 256, 65536]), return_inverse=True)  # each color is judged once
    found = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], 1).astype(np.float32)
    colors = palette(grid).astype(np.float32)
    squares = (-2 * found) @ colors.T  # of the distances (found, 1 + a * a): whole numbers, which float32 holds exactly
    squares += (colors**2).sum(1)
    squares += (found**2).sum(1)[:, None]
    where = where.reshape(picture.shape[:2])
    areas = np.bincount(squares.argmin(1)[where].ravel(), minlength=len(colors))
    there = np.flatnonzero((areas >= max(least, 1)) | (np.arange(len(colors)) == 0))  # background may always be there
    if size in (None, picture.shape[:2]):
        owner = squares[:, there].argmin(1)[where]
    else:
        planes = torch.from_numpy(np.sqrt(squares[:, there])[where]).permute(2, 0, 1)[None]  # (1, colors, h, w)
        owner = F.interpolate(planes, size, mode="bilinear", align_corners=False)[0].argmin(0).numpy()
    cells = np.unique(owner)
    return owner == cells[cells > 0].reshape(-1, 1, 1)
