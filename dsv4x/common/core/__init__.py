"""What everything stands on: layouts, number formats, index spaces, the machine, checks, errors."""
