"""The tests; a package so that rank processes can import the work that tests give them."""
