"""What a model tells about itself: the weights worth compressing, by structure and not by class."""

from fxshare.knowing.proposal import Proposal, ProposedType
from fxshare.knowing.propose import init, propose

__all__ = ["Proposal", "ProposedType", "init", "propose"]
