# CUDA against the CPU backend. Without a GPU the tests skip themselves; tests/gpu/run.sh runs these
# and every operation's own tests on a machine that has one.
if(MOE_WITH_CUDA)
  file(GLOB gpu_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/test_*.c)
  foreach(source ${gpu_sources})
    get_filename_component(base ${source} NAME_WE)
    string(REGEX REPLACE "^test_" "gpu_" name ${base})
    moe_test_program(test_${name} ${source} moe_kernels)
    target_sources(test_${name} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/both.c)
    target_link_libraries(test_${name} PRIVATE PkgConfig::CRITERION)
    add_test(NAME gpu.${base} COMMAND test_${name} -j1)
  endforeach()
endif()
