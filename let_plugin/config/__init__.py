"""The `[let]` and `[runtime]` tables, and the way from a TOML file to a torchtitan configuration.

Importing this package imports neither torch nor torchtitan: `[runtime] device` has to be known before they are.
"""

from let_plugin.config.tables import AdaptiveStopConfig as AdaptiveStopConfig
from let_plugin.config.tables import InitConfig as InitConfig
from let_plugin.config.tables import LetConfig as LetConfig
from let_plugin.config.tables import PairConfig as PairConfig
from let_plugin.config.tables import ProjectorConfig as ProjectorConfig
from let_plugin.config.tables import RuntimeConfig as RuntimeConfig
from let_plugin.config.tables import TeacherConfig as TeacherConfig
from let_plugin.config.tables import TermConfig as TermConfig
from let_plugin.config.tables import TokenAlignmentConfig as TokenAlignmentConfig
