"""What everything speaks: the algebra, the tables, the names. It knows nobody."""
