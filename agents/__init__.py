"""Recycling for stable-baselines3 agents on changing tasks."""

from agents.callback import RecycleCallback as RecycleCallback
from agents.callback import attach as attach
from agents.deepened import remember_depth as remember_depth
from agents.elastic import load_policy as load_policy
from agents.elastic import remember_widths as remember_widths
from agents.networks import networks_of as networks_of
