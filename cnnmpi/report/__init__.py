"""Pages that show what runs have learned: read a run's folder, draw, write one file. ``python -m cnnmpi.report``."""

from cnnmpi.report.one import one_run as one_run
from cnnmpi.report.pictures import confusion_pixels as confusion_pixels
from cnnmpi.report.pictures import grid as grid
from cnnmpi.report.pictures import to_uint8 as to_uint8
from cnnmpi.report.run import CONFIG as CONFIG
from cnnmpi.report.run import METRICS as METRICS
from cnnmpi.report.run import STARTS as STARTS
from cnnmpi.report.run import STEPS as STEPS
from cnnmpi.report.run import Judged as Judged
from cnnmpi.report.run import Run as Run
from cnnmpi.report.run import read_run as read_run
from cnnmpi.report.several import several_runs as several_runs
