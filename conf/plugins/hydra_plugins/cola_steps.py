"""Resolver for conf/chain: DVC loads this folder before it composes conf/ (`hydra.plugins_path`)."""

from omegaconf import OmegaConf


def share(total: int, link: int, links: int) -> int:
    """Steps of one link when `total` steps are dealt evenly over `links` links; the shares add up to `total`."""
    return total * link // links - total * (link - 1) // links


OmegaConf.register_new_resolver("share", share, replace=True)
