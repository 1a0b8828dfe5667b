# Management libraries for test_power, as they are and as they were.
foreach(age new old)
  add_library(moe_fake_nvml_${age} SHARED ${CMAKE_CURRENT_SOURCE_DIR}/kernels/fake_nvml.c)
  set_target_properties(moe_fake_nvml_${age} PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_RUNTIME_OUTPUT_DIRECTORY})
  add_dependencies(test_kernels_power moe_fake_nvml_${age})
endforeach()
target_compile_definitions(moe_fake_nvml_old PRIVATE FAKE_OLD)
