"""Train one update: compose rows, run optimizer steps, judge the result at the gate."""
