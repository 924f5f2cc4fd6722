"""Weighted k-means, for many point clouds at once."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_kmeans(
    points: Tensor, weights: Tensor, clusters: int, *, iterations: int = 50, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on weighted points, begun by k-means++ (Arthur and Vassilvitskii 2007).

    The first centroid is a point drawn in proportion to its weight, each next one in proportion to its weight times
    its squared distance to the nearest centroid so far. A cluster that loses all its weight begins anew at the point
    for which that product is largest.

    Args:
        points: ``(clouds, points, features)``, on the CPU.
        weights: not negative, ``(clouds, points)``.
        clusters: how many; no more than there are points.
        iterations: steps at most; it ends when no point changes its cluster.
        generator: source of randomness; None: torch's global one.

    Returns:
        The cluster of each point, ``(clouds, points)``, and the centroids, ``(clouds, clusters, features)``.

    Raises:
        ValueError: there are fewer points than clusters, or a weight is negative or not finite.
    """
    count = points.shape[1]
    if not 1 <= clusters <= count:
        raise ValueError(f"weighted_kmeans needs 1 to {count} clusters for {count} points, got {clusters}")
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("weighted_kmeans needs finite weights >= 0")
    weights = weights.to(points)
    centroids = _drawn(points, weights, generator)
    while centroids.shape[1] < clusters:
        gap = _squared_distances(points, centroids).amin(2)
        centroids = torch.cat([centroids, _drawn(points, weights * gap, generator)], 1)
    members = torch.full(weights.shape, -1)
    for _ in range(iterations):
        gaps = _squared_distances(points, centroids)
        nearest = gaps.argmin(2)
        if torch.equal(nearest, members):
            break
        members = nearest
        centroids = _centred(points, weights, members, centroids, gaps.amin(2))
    return members, centroids


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """``(clouds, points, clusters)``; as sums of squares, so that a point is at distance 0 from itself."""
    return torch.stack([(points - centre[:, None]).square().sum(2) for centre in centroids.unbind(1)], 2)


def _drawn(points: Tensor, chances: Tensor, generator: torch.Generator | None) -> Tensor:
    """One point of each cloud, ``(clouds, 1, features)``; any point, where no chance is above zero."""
    chances = torch.where(chances.sum(1, keepdim=True) > 0, chances, 1.0)
    chosen = torch.multinomial(chances, 1, generator=generator)
    return points.gather(1, chosen[:, :, None].expand(-1, -1, points.shape[2]))


def _centred(points: Tensor, weights: Tensor, members: Tensor, centroids: Tensor, gap: Tensor) -> Tensor:
    """Weighted means of the clusters; those without weight at the points that are worst served, one after the other."""
    clouds = torch.arange(len(points))
    inside = torch.nn.functional.one_hot(members, centroids.shape[1]).to(points) * weights[:, :, None]
    mass = inside.sum(1)
    means = inside.transpose(1, 2) @ points / mass.clamp_min(torch.finfo(points.dtype).tiny)[:, :, None]
    cost = weights * gap
    for cluster in (mass <= 0).any(0).nonzero()[:, 0].tolist():
        worst = cost.argmax(1)
        empty = (mass[:, cluster] <= 0) & (cost[clouds, worst] > 0)
        means[:, cluster] = torch.where(
            empty[:, None],
            points[clouds, worst],
            torch.where(mass[:, cluster, None] > 0, means[:, cluster], centroids[:, cluster]),
        )
        cost[clouds[empty], worst[empty]] = 0
    return means
