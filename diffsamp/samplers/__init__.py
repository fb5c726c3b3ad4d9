"""Factories of samplers, one published method per file."""

from diffsamp.samplers.cdds import cdds as cdds
from diffsamp.samplers.dds import dds as dds
from diffsamp.samplers.dis import dis as dis
from diffsamp.samplers.gbs import gbs as gbs
from diffsamp.samplers.gmp import gmp as gmp
from diffsamp.samplers.pis import pis as pis
from diffsamp.samplers.scds import scds as scds

__all__ = ["cdds", "dds", "dis", "gbs", "gmp", "pis", "scds"]
