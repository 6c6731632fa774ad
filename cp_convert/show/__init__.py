"""What a person sees: records come in; tables, bars and pages go out.

The only place that knows rich.
"""
