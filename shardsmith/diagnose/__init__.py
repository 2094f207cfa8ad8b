"""What is wrong with a checkpoint, and what is not: findings as data, one file a level, printing apart."""

from shardsmith.compare.findings import Diagnosis, Finding, Looked
from shardsmith.diagnose.diagnosis import diagnose
from shardsmith.diagnose.questions import Questions

__all__ = ["Diagnosis", "Finding", "Looked", "Questions", "diagnose"]
