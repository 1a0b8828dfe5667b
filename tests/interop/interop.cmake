# Other programs read what we write: tests/interop/NAME.sh skips (77) where they are not installed.
moe_test_program(interop_logits ${CMAKE_CURRENT_LIST_DIR}/logits.c moe_training)
add_test(NAME interop.hf COMMAND ${CMAKE_CURRENT_LIST_DIR}/hf.sh)
set_tests_properties(interop.hf PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77
  ENVIRONMENT "${MOE_TEST_ENV};MOE_BUILD=${CMAKE_BINARY_DIR}")
