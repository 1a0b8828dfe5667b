# Texts of moe-generate against transformers and vLLM; skips (77) where they are not installed.
foreach(reader transformers vllm)
  add_test(NAME interop.generate_${reader} COMMAND ${CMAKE_CURRENT_LIST_DIR}/generate_hf.sh ${reader})
  set_tests_properties(interop.generate_${reader} PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77
    ENVIRONMENT "${MOE_TEST_ENV};MOE_BUILD=${CMAKE_BINARY_DIR}")
endforeach()
