"""The plugin's entry point in verl's group `verl.plugins`, which verl 0.9 imports in every process of every run.

It waits for trainers, and does nothing in a run whose `external_lib` does not name the plugin; see `trainers`.
"""

from dta_plugin.adapters.verl_plugin import trainers

trainers.watch()
