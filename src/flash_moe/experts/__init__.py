"""Expert stores: they locate the records of experts and fetch them."""
