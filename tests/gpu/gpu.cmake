# CUDA against the CPU backend. gpu_tests is one program of these tests and of every operation's own
# (one, because each program carries all kernels): easy to take to a machine with a GPU, where run.sh
# starts it. Here its tests skip themselves without a GPU.
if(MOE_WITH_CUDA)
  file(GLOB gpu_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.c
    ${CMAKE_CURRENT_SOURCE_DIR}/kernels/test_*.c)
  moe_test_program(gpu_tests "${gpu_sources}" moe_model)
  target_link_libraries(gpu_tests PRIVATE PkgConfig::CRITERION)
  add_test(NAME gpu.agree COMMAND gpu_tests -j1 --filter "gpu_*/*")
endif()
